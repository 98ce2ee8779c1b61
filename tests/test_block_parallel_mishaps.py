"""When something goes wrong in one of the processes that hold a block each, all end, and the run can go on."""

from __future__ import annotations

import time

import pytest
from test_block_parallel import SAVED, assert_same, passed, run, settled
from test_sharding import needs_torch


# The first test waits for several runs.
pytestmark = [pytest.mark.launch, pytest.mark.timeout(900)]

CASE = {"specimen": "bert", "args": SAVED, "config": {"head_layers": 0}}
DROPPING = {**CASE, "dropout": 0.1}
# Long enough to be told to end in the middle.
LONG = {**DROPPING, "args": {"max_steps": 40}}


def failed(folder, *, processes=2, blocks=2, config=None, **what):
    """Run a case that goes wrong; return what was printed, and the seconds it took to end."""
    case = {**CASE, "config": {**CASE["config"], **(config or {})}, **what}
    start = time.monotonic()
    result = run(folder, {"case": settled(case, processes=blocks)}, processes=processes, timeout=120)
    assert result.returncode != 0
    return result.stderr, time.monotonic() - start


def test_an_error_in_one_process_ends_all_and_is_told_by_block_and_step(tmp_path):
    said, _ = failed(tmp_path, raises=[1, 5])
    assert "KeyError: 'no such column'" in said
    assert "In block 1 (rank 1), at step 5." in said


def test_other_batches_in_one_process_are_an_error_that_says_so(tmp_path):
    said, _ = failed(tmp_path, odd=1)
    assert "BatchMismatchError: Block 1 has read at step 0 0 a batch of input_ids [4, 12] with checksum" in said
    assert "must read the same batches" in said


def test_a_process_that_hangs_ends_all(tmp_path):
    said, seconds = failed(tmp_path, stopped=[0, 5], config={"peer_timeout": 4.0})
    assert "Block 0 (rank 0) has shown no sign of life for" in said
    assert seconds < 100


def test_a_process_that_dies_in_an_evaluation_ends_all(tmp_path):
    said, seconds = failed(tmp_path, killed=[1, 2], evaluating=True, config={"peer_timeout": 4.0})
    assert "BlockPeerError: Block 1 (rank 1) is gone; last heard of at step" in said
    assert "Block 0 (rank 0) was at step 6 and cannot go on without it" in said
    assert seconds < 100


def test_a_process_that_hangs_in_an_evaluation_ends_all(tmp_path):
    said, seconds = failed(tmp_path, silent=[1, 2], evaluating=True, config={"peer_timeout": 4.0})
    assert "BlockPeerError: Block 1 (rank 1) has shown no sign of life for" in said
    assert "Block 0 (rank 0) was at step 6" in said
    assert seconds < 100


def test_a_process_that_hangs_while_another_generates_ends_all(tmp_path):
    """The one that generates takes longer than a sign of life may, for a batch in which nobody hangs too."""
    generating = {"specimen": "t5", "writes": {}, "slow": [1, 0.3], "args": {"max_steps": 1}}
    said, seconds = failed(tmp_path, silent=[0, 1], evaluating=True, config={"peer_timeout": 4.0}, **generating)
    assert "BlockPeerError: Block 0 (rank 0) has shown no sign of life for" in said
    assert "Block 1 (rank 1) was at step 1" in said
    assert "in generate" in said
    assert seconds < 100


def test_a_chain_that_hangs_ends_the_other_chains(tmp_path):
    """They wait for it where gradients are averaged, and nowhere else."""
    said, seconds = failed(tmp_path, processes=4, silent=[3, 5], config={"peer_timeout": 4.0})
    assert "Block 1 (rank 3) has shown no sign of life for" in said
    assert seconds < 100


@needs_torch
def test_a_chain_that_hangs_ends_the_others_where_layers_are_brought_together(tmp_path):
    config = {"peer_timeout": 4.0, "shard_replicas": True}
    said, seconds = failed(tmp_path, processes=4, silent=[3, 5], config=config)
    assert "Block 1 (rank 3) has shown no sign of life for" in said
    assert seconds < 100


# ---- Runs that go on ----


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """End a run by killing a process, and another by telling all to end; go on from their checkpoints.

    Returns:
        The folder of all runs, and what was printed when the process was killed.
    """
    folder = tmp_path_factory.mktemp("ended")
    said, _ = failed(folder / "killed", killed=[1, 5], dropout=0.1)
    told = {**LONG, "config": {**LONG["config"], "save_on_exit": True}, "told_to_end": 7}
    run(folder / "told", {"case": settled(told, processes=2)}, processes=2)
    cases = {"short": DROPPING, "long": LONG}
    cases["short, resumed"] = {**DROPPING, "resume": str(folder / "killed" / "case" / "checkpoint-3")}
    cases["long, resumed"] = {**LONG, "resume": str(saved_by(folder / "told" / "case"))}
    passed(run(folder, {name: settled(case, processes=2) for name, case in cases.items()}, processes=2))
    return folder, said


def saved_by(folder):
    """The only checkpoint in a folder."""
    (checkpoint,) = folder.glob("checkpoint-*")
    return checkpoint


def test_a_process_that_is_killed_ends_all_and_the_run_goes_on_from_its_checkpoint(ended):
    folder, said = ended
    assert "Block 1 (rank 1) is gone; " in said
    assert_same(folder / "short" / "final", folder / "short, resumed" / "final")


def test_told_to_end_all_processes_save_at_the_same_step_and_the_run_goes_on_from_there(ended):
    folder, _ = ended
    assert 7 <= int(saved_by(folder / "told" / "case").name.split("-")[1]) < 20
    assert not (folder / "told" / "case" / "final").exists()
    assert_same(folder / "long" / "final", folder / "long, resumed" / "final")
