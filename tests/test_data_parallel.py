"""Data parallelism under the real `accelerate launch`: the same weights as one process with the doubled batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_blocklocal.errors import CutError
from hf_blocklocal.optim import collectives
from hf_blocklocal.optim.collectives import check_same_cut_everywhere
from hf_blocklocal.optim.data_parallel import GradientAverager
from hf_blocklocal.records.history import HISTORY_NAME, StepTime, Training, read_history


SCRIPT = Path(__file__).parent / "launched" / "data_parallel.py"
BY_STEPS = {"num_blocks": 4, "step_per_block": True}
CASES = {
    "bert": {"specimen": "bert", "config": {"num_blocks": 2}},
    "bert, step per block": {"specimen": "bert", "config": BY_STEPS},
    "bert, overlap": {
        "specimen": "bert",
        "config": {**BY_STEPS, "overlap": 1, "global_every": 3, "head_warmup_steps": 1},
    },
    "bert, anchor": {
        "specimen": "bert",
        "config": {"num_blocks": 2, "anchor": 2.0, "block_lr_decay": 0.5, "global_every": 2},
    },
    "bert, copies": {
        "specimen": "bert",
        "config": {"num_blocks": 2, "head_layers": 1, "head_refresh_steps": 2, "head_refresh_lag": 1},
    },
    "gpt2": {"specimen": "gpt2", "config": {"num_blocks": 2, "negatives": None}},
    "llama, one block": {"specimen": "llama", "config": {"num_blocks": 1}},
}


@pytest.fixture
def alone():
    """Make this process the only one of its group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_processes_that_have_cut_the_model_differently_are_refused(monkeypatch):
    monkeypatch.setattr(collectives, "gather_from_processes", lambda mine, _processes: [mine, [2]])
    check_same_cut_everywhere((2,), 2)
    with pytest.raises(CutError, match=r"rank 0: \[3\], rank 1: \[2\].*boundaries=\[3\], without balance"):
        check_same_cut_everywhere((3,), 2)


@pytest.mark.parametrize("lacks_one", [False, True])
def test_gradients_are_averaged_without_a_look_at_them_unless_one_is_missing(lacks_one, alone, monkeypatch):
    looks, read = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: looks.append(tensor) or read(tensor))
    parameters = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))]
    parameters[0].grad = torch.full((2, 2), 4.0)
    parameters[1].grad = None if lacks_one else torch.full((3,), 6.0)
    averager = GradientAverager(2)  # the other one adds nothing
    averager.start(parameters)
    averager.finish()
    assert torch.equal(parameters[0].grad, torch.full((2, 2), 2.0))
    assert (parameters[1].grad is None) if lacks_one else torch.equal(parameters[1].grad, torch.full((3,), 3.0))
    assert len(looks) == lacks_one


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(command):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run all cases in two processes, and in one with the doubled batch; return the folder of both."""
    folder, cases = tmp_path_factory.mktemp("data_parallel"), json.dumps(CASES)
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", str(free_port())]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options]
    run([*launch, str(SCRIPT), str(folder / "two"), "4", cases])
    run([sys.executable, str(SCRIPT), str(folder / "one"), "8", cases])
    return folder


@pytest.mark.launch
@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one_with_the_doubled_batch(runs, name):
    both, one = runs / "two" / name, runs / "one" / name
    first, second = (torch.load(both / f"state-{rank}.pt") for rank in (0, 1))
    alone = torch.load(one / "state-0.pt")
    for key, value in alone.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=0, atol=1e-6)
    log_both, log_one = (json.loads((folder / "log.json").read_text()) for folder in (both, one))
    assert log_both["world_size"] == 2
    assert log_both["metrics"].keys() == log_one["metrics"].keys()
    for key, value in log_one["metrics"].items():
        if key.endswith(("loss", "accuracy")) and "block" in key:
            assert log_both["metrics"][key] == pytest.approx(value, abs=1e-5), key
    rows = read_history(both / HISTORY_NAME)
    assert [row.step for row in rows if isinstance(row, Training)] == [1, 2, 3, 4, 5]
    assert {row.process for row in rows if isinstance(row, StepTime) and row.steps == 5} == {0, 1}
    for step_both, step_one in zip(log_both["history"][:5], log_one["history"][:5], strict=True):
        for key in step_one:
            assert step_both[key] == pytest.approx(step_one[key], rel=1e-4), key
