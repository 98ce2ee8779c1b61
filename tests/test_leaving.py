"""A single process that is told to end writes a checkpoint first, and goes on from there to the bit."""

from __future__ import annotations

import signal

import pytest
from test_parity import equal
from training import make, snapshot
from transformers import TrainerCallback

from hf_blocklocal import BlockLocalConfig
from hf_blocklocal.config.refusals import check_can_be_told_to_end
from hf_blocklocal.errors import UnsupportedSettingError


SAVING = BlockLocalConfig(num_blocks=2, save_on_exit=True)


@pytest.fixture(autouse=True)
def _interruptible():
    """Let Ctrl-C raise, as it does in a terminal: what runs in the background may be told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Tell(TrainerCallback):
    def __init__(self, sign, times=1):
        self.sign, self.times = sign, times
        self.saved = []

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            for _ in range(self.times):
                signal.raise_signal(self.sign)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_end_is_resumed_to_the_bit(sign, tmp_path, caplog):
    whole = make("bert", tmp_path / "whole", config=SAVING, max_steps=4)
    whole.train()
    before = signal.getsignal(sign)
    tell = Tell(sign)
    told = make("bert", tmp_path / "told", config=SAVING, max_steps=4, callbacks=[tell])
    told.train()
    assert tell.saved == [2]
    assert signal.getsignal(sign) is before
    assert told.state.global_step == 2
    assert caplog.text.count("Told to end: training stops after step 2 of 4") == 1
    resumed = make("bert", tmp_path / "told", config=SAVING, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert equal(snapshot(whole), snapshot(resumed))


def test_who_asks_twice_is_not_kept_waiting(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make("bert", tmp_path, config=SAVING, callbacks=[Tell(signal.SIGINT, times=2)]).train()


def test_without_being_asked_to_nothing_is_saved(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make("bert", tmp_path, callbacks=[Tell(signal.SIGINT)]).train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_processes_that_would_stop_at_different_steps_are_refused():
    check_can_be_told_to_end(1)
    with pytest.raises(UnsupportedSettingError, match="save_on_exit=True and 2 processes that have all blocks each"):
        check_can_be_told_to_end(2)
