"""A block per process under the real `accelerate launch`: the same weights, metrics and checkpoints as in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_data_parallel import free_port

from hf_blocklocal.records.history import HISTORY_NAME, Timeline, read_history


# The first test waits for all runs.
pytestmark = [pytest.mark.launch, pytest.mark.timeout(900)]

SCRIPT = Path(__file__).parent / "launched" / "block_parallel.py"
CONFIG = Path(__file__).parents[1] / "configs" / "accelerate" / "cpu_2.yaml"
SAVED = {"save_strategy": "steps", "save_steps": 3}
BEST = {
    **SAVED,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "load_best_model_at_end": True,
    "metric_for_best_model": "block_0_loss",
}
WRITTEN = {**BEST, "metric_for_best_model": "written"}
# What only block-parallel training fills in by itself.
COPIED = {"head_copies": "trained"}
# Cases of two processes, each with the block-parallel size that it gets there.
TWO = {
    "bert": {"specimen": "bert", "dropout": 0.1, "drift": 4, "args": BEST, "config": {"block_lr_decay": 0.5}},
    "bert, own heads": {
        "specimen": "bert",
        "dropout": 0.1,
        "args": {"gradient_accumulation_steps": 2},
        "config": {"head_layers": 0, "step_per_block": True, "denoising": 0.5, "anchor": 1.0},
    },
    "bert, scaled": {
        "specimen": "bert",
        "dropout": 0.1,
        "scaled": {"growth_interval": 2},
        "overflows": [[2, 4], "bert.encoder.layer.0.attention.self.query"],
        "args": SAVED,
        "config": {"anchor": 0.5, "head_refresh_steps": 2, "head_refresh_lag": 1},
    },
    "bert, scaled and stepped at once": {
        "specimen": "bert",
        "scaled": {},
        "overflows": [[3], "bert.encoder.layer.2.attention.self.query"],
        "config": {"step_per_block": True, "head_layers": 0},
    },
    "llama, in fp16": {"specimen": "llama", "half": True, "config": {"head_layers": 1}},
    "gpt2": {
        "specimen": "gpt2",
        "dropout": 0.1,
        "args": SAVED,
        "generates": [[5, 6, 7]],
        "config": {"head_refresh_steps": 2, "head_refresh_lag": 3, "tied_weights": "untie"},
    },
    "gpt2, frozen": {"specimen": "gpt2", "dropout": 0.1, "config": {"head_layers": 0, "tied_weights": "freeze"}},
    "llama": {
        "specimen": "llama",
        "args": {"bf16": True},
        "config": {"head_layers": 1, "head_copies": "frozen", "head_refresh_decay": 0.5, "chunked_loss": 5},
    },
    "llama, own heads": {
        "specimen": "llama",
        "batch_size": 3,
        "config": {"head_layers": 0, "head_refresh_steps": 3, "head_refresh_lag": 1},
    },
    "t5": {"specimen": "t5", "dropout": 0.1, "args": SAVED, "config": {"tied_weights": "freeze"}},
    "t5, own heads": {"specimen": "t5", "dropout": 0.1, "config": {"tied_weights": "freeze", "head_layers": 0}},
    "t5, writing": {
        "specimen": "t5",
        "dropout": 0.1,
        "lora": {"task_type": "SEQ_2_SEQ_LM", "r": 4, "target_modules": ["q", "v"]},
        "args": {**WRITTEN, "eval_steps": 1, "save_steps": 1},
        "patience": 1,
        "writes": {"max_length": 7, "num_beams": 2},
        "config": {"tied_weights": "freeze", "head_layers": 0, "head_refresh_steps": 10, "head_refresh_lag": 1},
    },
    "bert, LoRA": {
        "specimen": "bert",
        "dropout": 0.1,
        "args": SAVED,
        "lora": {"task_type": "SEQ_CLS", "r": 4, "target_modules": ["query", "value"], "lora_dropout": 0.1},
        "config": {},
    },
    "vit": {
        "specimen": "vit",
        "dropout": 0.1,
        "noisy": True,
        "args": {"dataloader_num_workers": 1},
        "config": {"reconstruction": 0.5, "head_layers": 0},
    },
    "resnet": {
        "specimen": "resnet",
        "runs": 2,
        "args": BEST,
        "config": {"head_layers": 1, "head_refresh_steps": 2, "head_refresh_lag": 1},
    },
    "llama, compiled": {
        "specimen": "llama",
        "args": {"torch_compile": True, "torch_compile_backend": "eager"},
        "config": {"head_layers": 0, "head_refresh_steps": 10},
    },
    "bert, partly frozen": {
        "specimen": "bert",
        "frozen": "bert.embeddings",
        "normalised": True,
        "runs": 2,
        "args": {"gradient_checkpointing": True},
        "config": {"head_layers": 0},
    },
    "bert, frozen below": {"specimen": "bert", "frozen": "bert.embeddings", "config": {}},
    "t5, checkpointed": {
        "specimen": "t5",
        "dropout": 0.1,
        "args": {"gradient_checkpointing": True},
        "config": {"tied_weights": "freeze"},
    },
}
FOUR = {
    "bert in 4": {
        "specimen": "bert",
        "dropout": 0.1,
        "config": {"num_blocks": 4, "head_layers": 2, "block_lr_decay": 0.5},
    },
    "t5 in 4": {"specimen": "t5", "dropout": 0.1, "config": {"num_blocks": 4, "tied_weights": "freeze"}},
    "deberta in 4": {"specimen": "deberta_v2", "dropout": 0.1, "config": {"num_blocks": 4}},
    "bart in 4, writing": {
        "specimen": "bart",
        "dropout": 0.1,
        "args": WRITTEN,
        "writes": {"max_new_tokens": 6, "do_sample": True},
        "config": {
            "num_blocks": 4,
            "tied_weights": "freeze",
            "head_refresh_steps": 2,
            "head_refresh_lag": 2,
        },
    },
}
# Two chains of two blocks, against two processes with both blocks each.
CHAINS = {
    "bert in chains": {"specimen": "bert", "batch_size": 2, "dropout": 0.1, "args": BEST, "config": {}},
    "bert in chains, scaled": {
        "specimen": "bert",
        "batch_size": 1,
        "unlabelled": [0, 3, 7, 8, 9, 14, 15, 20],
        "scaled": {"growth_interval": 2},
        "overflows": [[3], "bert.encoder.layer.2.attention.self.query"],
        "args": {"max_steps": 10, "save_strategy": "steps", "save_steps": 10},
        "config": {"head_layers": 0},
    },
    "gpt2 in chains": {
        "specimen": "gpt2",
        "batch_size": 2,
        "dropout": 0.1,
        "config": {"head_layers": 0, "tied_weights": "freeze"},
    },
    "t5 in chains, writing": {
        "specimen": "t5",
        "batch_size": 2,
        "dropout": 0.1,
        "args": WRITTEN,
        "writes": {},
        "config": {"tied_weights": "freeze", "head_refresh_steps": 10, "head_refresh_lag": 1},
    },
}
IN_CHAINS = ("four", "t5 in chains, writing")
COUNTED = {
    "specimen": "llama",
    "counted": True,
    "args": {"logging_steps": 100, "gradient_accumulation_steps": 2},
    "config": {"num_blocks": 2, "block_parallel_size": 2, "head_refresh_steps": 2, "head_refresh_lag": 1},
}


def settled(case, *, processes):
    """Return a case as it is to be run in one process, or in one for every block."""
    config = {"num_blocks": 2, **case["config"]}
    if processes == 1 and config.get("head_layers") != 0:
        if not any(name.startswith("head_refresh") for name in config):
            config |= COPIED
        if case["specimen"] in ("t5", "bart"):
            config |= {"head_bypass": "skip"}
    return case | {"config": config | ({"block_parallel_size": processes} if processes > 1 else {})}


def command(folder, cases, processes):
    arguments = [str(SCRIPT), str(folder), json.dumps(cases)]
    if processes == 1:
        return [sys.executable, *arguments]
    options = ["--config_file", str(CONFIG), "--num_processes", str(processes)]
    options += ["--main_process_port", str(free_port())]
    return [sys.executable, "-m", "accelerate.commands.launch", *options, *arguments]


def run(folder, cases, *, processes, timeout=240):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command(folder, cases, processes),
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def passed(result):
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run all cases in one process, in two and in four; return the folder of each."""
    folder = tmp_path_factory.mktemp("runs")
    alone = {name: settled(case, processes=1) for name, case in {**TWO, **FOUR}.items()}
    passed(run(folder / "one", alone, processes=1))
    two = {name: settled(case, processes=2) for name, case in TWO.items()}
    pairs = {name: settled(case, processes=1) for name, case in CHAINS.items()}
    passed(run(folder / "two", two | pairs | {"counted": COUNTED}, processes=2))
    four = {name: settled(case, processes=4) for name, case in FOUR.items()}
    chains = {name: settled(case, processes=2) for name, case in CHAINS.items()}
    passed(run(folder / "four", four | chains | {"counted": COUNTED}, processes=4))
    return folder


def weights(folder):
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    return {f"{file}/{name}": tensor for file in files for name, tensor in load_file(folder / file).items()}


def assert_same(one, other):
    """The weights of two runs are the same to the bit, wherever they have left any."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert len(first) > 0
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def logs_of(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("log-*.json"))]


def without_times(values):
    return {key: value for key, value in values.items() if not key.endswith(("runtime", "per_second"))}


PLACES = [*((name, "one", "two", 2) for name in TWO), *((name, "one", "four", 4) for name in FOUR)]
PLACES += [(name, "two", "four", 4) for name in CHAINS]


@pytest.mark.parametrize(("name", "first", "second", "processes"), PLACES, ids=[place[0] for place in PLACES])
def test_the_same_weights_and_metrics_wherever_blocks_are(runs, name, first, second, processes):
    assert_same(runs / first / name, runs / second / name)
    reference = logs_of(runs / first / name)[0]
    logs = logs_of(runs / second / name)
    assert len(logs) == processes
    for log in logs:
        assert without_times(log["metrics"]) == without_times(reference["metrics"])
        assert log["predictions"] == reference["predictions"]
        assert log["generated"] == reference["generated"]
        assert log["training_loss"] == pytest.approx(reference["training_loss"], rel=1e-5)


@pytest.mark.parametrize(("name", "first", "second", "processes"), PLACES, ids=[place[0] for place in PLACES])
def test_logs_are_those_of_one_process(runs, name, first, second, processes):
    for mine, theirs in zip(*(logs_of(runs / place / name)[0]["history"] for place in (first, second)), strict=True):
        assert without_times(theirs) == pytest.approx(without_times(mine), rel=1e-5)


@pytest.mark.parametrize(("name", "first", "second", "processes"), PLACES, ids=[place[0] for place in PLACES])
def test_no_process_holds_the_whole_model(runs, name, first, second, processes):
    assert all(log["held"] < 0.85 for log in logs_of(runs / second / name))
    assert all(log["held"] == 1 for log in logs_of(runs / first / name))


def test_files_of_weights_are_those_of_one_process(runs):
    for name in ("bert", "gpt2", "t5", "resnet"):
        first, second = (runs / place / name / "final" / "model.safetensors" for place in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()


def test_what_the_last_block_does_not_know_is_not_predicted(runs):
    assert [logs_of(runs / place / "t5 in 4")[0]["parts"] for place in ("one", "four")] == [2, 1]


def test_the_history_says_who_worked_when(runs):
    for place, name, blocks in (("two", "bert", 2), ("four", "bert in 4", 4), ("four", "bert in chains", 2)):
        rows = [row for row in read_history(runs / place / name / "final" / HISTORY_NAME) if isinstance(row, Timeline)]
        assert {row.block for row in rows} == set(range(blocks))
        assert all(row.start < row.stop for row in rows)
        for block in range(blocks):
            mine = [row for row in rows if row.block == block]
            assert all(one.stop <= other.start for one, other in zip(mine, mine[1:], strict=False))


def test_the_whole_model_generates_in_every_process(runs):
    logs = logs_of(runs / "two" / "gpt2")
    assert [len(log["generated"][0]) for log in logs] == [9, 9]


def test_one_process_of_a_chain_has_the_whole_model_while_it_generates(runs):
    for place, name, blocks in (("two", "t5, writing", 2), ("four", "bart in 4, writing", 4), (*IN_CHAINS, 2)):
        for rank, log in enumerate(logs_of(runs / place / name)):
            most, left = log["brought"]
            assert (most > 0) == (rank % blocks == blocks - 1)
            assert left == 0


def test_no_text_is_counted_twice_and_the_generation_config_is_that_of_one_process(runs):
    for first, second, name in (("one", "four", "bart in 4, writing"), ("two", *IN_CHAINS)):
        for place in (first, second):
            assert all(log["metrics"]["eval_texts"] == 11 for log in logs_of(runs / place / name))
        configs = [(runs / place / name / "final" / "generation_config.json").read_text() for place in (first, second)]
        assert configs[0] == configs[1]


def test_nothing_stalls_the_stream(runs):
    """One chain does nothing together; several count their tokens and average the gradients of every block."""
    for log in logs_of(runs / "two" / "counted"):
        assert log["collectives"][1:] == [[]] * 5  # before the first step copies of a block are brought in line
    for log in logs_of(runs / "four" / "counted"):
        assert log["collectives"][1:] == [["all_reduce", "all_reduce"]] * 5


def test_a_checkpoint_is_resumed_on_any_layout(runs, tmp_path):
    """Written by one process and resumed by two, and the other way round: as if nothing had happened."""
    names = ["bert", "gpt2", "bert, scaled"]
    crossed = {}
    for here, there, processes in (("one", "two", 2), ("two", "one", 1)):
        cases = {name: settled(TWO[name], processes=processes) for name in names}
        for name in names:
            cases[name]["resume"] = str(runs / here / name / "checkpoint-3")
        passed(run(tmp_path / there, cases, processes=processes))
        crossed[there] = tmp_path / there
    for name in names:
        for folder in crossed.values():
            assert_same(runs / "one" / name / "final", folder / name / "final")
            assert_same(runs / "one" / name / "checkpoint-6", folder / name / "checkpoint-6")


def test_optimizer_and_schedule_are_saved_as_one_process_saves_them(runs):
    for name in ("bert", "gpt2"):
        for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            first, second = (
                torch.load(runs / place / name / "checkpoint-6" / file, weights_only=False) for place in ("one", "two")
            )
            assert_equal(first, second)


def test_every_block_has_a_scale_of_its_own_in_a_checkpoint(runs):
    for first, second, name, step in (
        ("one", "two", "bert, scaled", 6),
        ("two", "four", "bert in chains, scaled", 10),
    ):
        checkpoints = [runs / place / name / f"checkpoint-{step}" / "scaler.pt" for place in (first, second)]
        one, other = (torch.load(checkpoint) for checkpoint in checkpoints)
        assert one == other
        assert one["blocks"]["0"] != one["blocks"]["1"]
        told = [{key for row in log["history"] for key in row} for log in logs_of(runs / second / name)]
        assert all({key for key in keys if "overflows" in key} for keys in told)


def assert_equal(first, second):
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for mine, theirs in zip(first, second, strict=True):
            assert_equal(mine, theirs)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert str(first) == str(second)
