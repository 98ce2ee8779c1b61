"""What was pushed comes back: runs go on from the Hub, heads and pages are found there."""

from __future__ import annotations

import re

import pytest
from sharing import make, pushing
from test_configs import script
from test_parity import equal
from transformers import TrainerCallback

from hf_blocklocal.commands import push
from hf_blocklocal.errors import FetchError


def test_a_run_goes_on_from_the_hub_to_the_bit(hub, tmp_path):
    whole = make(tmp_path / "whole", max_steps=4, save_strategy="no")
    whole.train()
    first = pushing(tmp_path / "first", "checkpoint", max_steps=4, save_steps=2, hub_always_push=True)

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    first.add_callback(Stop())
    first.train()
    assert first.state.global_step == 2
    resumed = make(tmp_path / "resumed", max_steps=4)
    resumed.train(resume_from_checkpoint="ann/run")
    assert resumed.state.global_step == 4
    assert equal(resumed.assembly.module.state_dict(), whole.assembly.module.state_dict())


def test_the_newest_of_all_checkpoints_is_taken(hub, tmp_path):
    pushing(tmp_path / "first", "all_checkpoints", max_steps=11, save_steps=1, save_total_limit=3).train()
    names = {name.partition("/")[0] for name in hub.files("ann/run") if name.startswith("checkpoint-")}
    newest = max(int(name.partition("-")[2]) for name in names)
    resumed = make(tmp_path / "resumed", max_steps=12)
    resumed.train(resume_from_checkpoint="ann/run")
    first = next(row for row in resumed.state.log_history if row.get("step", 0) > newest)
    assert first["step"] == newest + 1


def test_a_repository_without_checkpoints_cannot_be_gone_on_from(hub, run, tmp_path):
    trainer = make(tmp_path / "first", hub_model_id="ann/run")
    trainer.push_to_hub()
    with pytest.raises(FetchError, match="holds no checkpoint to go on from"):
        trainer.train(resume_from_checkpoint="ann/run")


def test_heads_come_back_from_the_hub(hub, tmp_path):
    trained = make(tmp_path / "trained", hub_model_id="ann/run")
    trained.train()
    trained.push_to_hub()
    other = make(tmp_path / "other")
    assert not equal(other.assembly.heads.state_dict(), trained.assembly.heads.state_dict())
    other.load_heads("ann/run")
    assert equal(other.assembly.heads.state_dict(), trained.assembly.heads.state_dict())


def test_history_figures_and_a_card_that_names_the_repository_arrive_with_the_model(hub, tmp_path):
    trainer = pushing(tmp_path / "run")
    trainer.train()
    trainer.push_to_hub()
    files = hub.files("ann/run")
    card = files["README.md"].decode()
    assert 'pipeline("text-classification", model=name)' in card
    assert 'name = "ann/run"\n' in card
    assert "history.jsonl" in files
    shown = set(re.findall(r"\]\((plots/.+?)\)", card))
    assert shown >= {"plots/cut.png", "plots/loss.png", "plots/memory.png"}
    assert shown <= files.keys()


def test_a_folder_that_is_pushed_later_gets_the_name_of_its_repository_too(hub, tmp_path):
    trainer = make(tmp_path / "run")
    trainer.train()
    trainer.save_model()
    assert 'name = "."  # this folder' in (tmp_path / "run" / "README.md").read_text()
    push.main([str(tmp_path / "run"), "ann/later"])
    assert 'name = "ann/later"\n' in hub.files("ann/later")["README.md"].decode()


def test_a_baseline_that_was_run_after_the_push_is_pushed_after_it(hub, tmp_path):
    train = script("train")
    trainer = pushing(tmp_path / "run")
    trainer.train()
    trainer.push_to_hub()
    (tmp_path / "run" / "README.md").write_text("---\ntags: [x]\n---\nKnows its baseline.\n")
    run = train.Run("m", "d", training={"push_to_hub": True})
    assert train.push_again(run, str(tmp_path / "run"), "ann/run") is None
    assert "Knows its baseline." in hub.files("ann/run")["README.md"].decode()
    hub.fail("/commit/", 403)
    (tmp_path / "run" / "README.md").write_text("---\ntags: [x]\n---\nOther.\n")
    assert "hf-blocklocal push" in train.push_again(run, str(tmp_path / "run"), "ann/run")
