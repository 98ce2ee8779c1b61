"""A block per process, with GPUs: what one process learns on one, to the bit.

Where there is one GPU, its processes share it, and gloo carries what they say. NCCL gives a GPU to one process alone,
unless it is 2.30 or later and NCCL_MULTI_RANK_GPU_ENABLE=1 is set; then it is what these tests use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from test_block_parallel import BEST, SAVED, SCRIPT, assert_same, logs_of, passed, settled, without_times
from test_data_parallel import free_port


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ON_GPU = {"use_cpu": False, "full_determinism": True}
TWO = {
    "bert": {"specimen": "bert", "dropout": 0.1, "args": BEST, "config": {}},
    "gpt2": {
        "specimen": "gpt2",
        "dropout": 0.1,
        "args": {"bf16": True},
        "config": {"head_refresh_steps": 2, "head_refresh_lag": 3, "tied_weights": "untie"},
    },
    "llama": {
        "specimen": "llama",
        "args": {"bf16": True},
        "config": {"head_layers": 0, "head_refresh_steps": 3, "head_refresh_lag": 1},
    },
    "llama, borrowing": {"specimen": "llama", "args": SAVED, "config": {"chunked_loss": 5}},
    "bert, fp16": {
        "specimen": "bert",
        "dropout": 0.1,
        "overflows": [[2], "bert.encoder.layer.0.attention.self.query"],
        "args": SAVED | {"fp16": True},
        "config": {"head_layers": 0, "step_per_block": True},
    },
    "llama, fp16": {"specimen": "llama", "args": {"fp16": True}, "config": {"chunked_loss": 5}},
    "t5": {"specimen": "t5", "dropout": 0.1, "config": {"tied_weights": "freeze"}},
    "vit": {"specimen": "vit", "dropout": 0.1, "args": {"gradient_accumulation_steps": 2}, "config": {}},
}
CHAINS = {
    "bert in chains": {"specimen": "bert", "batch_size": 2, "dropout": 0.1, "config": {}},
    "bert in chains, fp16": {"specimen": "bert", "batch_size": 2, "args": {"fp16": True}, "config": {}},
}
PLACES = [*((name, "one", "two", 2) for name in TWO), *((name, "two", "four", 4) for name in CHAINS)]


def launched(folder, cases, *, processes):
    """Run cases in one process, or in several that share out the GPUs there are; return how it went."""
    shared = torch.cuda.device_count() < processes and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1"
    backend = "gloo" if shared else "nccl"
    extra = ON_GPU | ({"ddp_backend": backend} if processes > 1 else {})
    cases = {name: case | {"args": extra | case.get("args", {})} for name, case in cases.items()}
    command = [str(SCRIPT), str(folder), json.dumps(cases)]
    if processes > 1:
        options = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]
        options += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
        command = ["-m", "accelerate.commands.launch", *options, *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def run(*args, **kwargs):
    """Run cases that go well."""
    passed(launched(*args, **kwargs))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run all cases in one process, in two and in four; return the folder of each."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "one", {name: settled(case, processes=1) for name, case in TWO.items()}, processes=1)
    two = {name: settled(case, processes=2) for name, case in TWO.items()}
    pairs = {name: settled(case, processes=1) for name, case in CHAINS.items()}
    run(folder / "two", two | pairs, processes=2)
    run(folder / "four", {name: settled(case, processes=2) for name, case in CHAINS.items()}, processes=4)
    return folder


@pytest.mark.parametrize(("name", "first", "second", "processes"), PLACES, ids=[place[0] for place in PLACES])
def test_the_same_weights_and_metrics_as_in_one_process(runs, name, first, second, processes):
    assert_same(runs / first / name, runs / second / name)
    reference = logs_of(runs / first / name)[0]
    logs = logs_of(runs / second / name)
    assert len(logs) == processes
    for log in logs:
        assert without_times(log["metrics"]) == pytest.approx(without_times(reference["metrics"]), rel=1e-6)
        assert log["predictions"] == reference["predictions"]
        assert log["held"] < 0.85


@pytest.mark.parametrize("name", ["bert", "bert, fp16", "llama, borrowing"])
def test_a_checkpoint_of_one_process_is_resumed_by_two_and_back(runs, name, tmp_path):
    for here, there, processes in (("one", "two", 2), ("two", "one", 1)):
        case = settled(TWO[name], processes=processes) | {"resume": str(runs / here / name / "checkpoint-3")}
        run(tmp_path / there, {name: case}, processes=processes)
        assert_same(runs / "one" / name / "final", tmp_path / there / name / "final")


@pytest.mark.parametrize(("hangs", "processes"), [([0, 3], 2), ([3, 3], 4)])
def test_a_process_that_hangs_ends_all(hangs, processes, tmp_path):
    """They wait for it in a stream, or where gradients are averaged."""
    case = {"specimen": "bert", "silent": hangs, "config": {"head_layers": 0, "peer_timeout": 4.0}}
    result = launched(tmp_path, {"case": settled(case, processes=2)}, processes=processes)
    assert result.returncode != 0
    assert f"(rank {hangs[0]}) has shown no sign of life for" in result.stderr
