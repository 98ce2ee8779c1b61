"""The emulated device of the pipelining benchmark sleeps when it should, and its rows are what was measured."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "benchmarks"))

import pipelining  # noqa: E402


@pytest.mark.parametrize("inside", [True, False])
def test_a_device_sleeps_one_pass_forward_and_two_backward(inside, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    device = pipelining.Device(2.0)
    hidden = torch.zeros(3, pipelining.WIDTH, requires_grad=inside)
    output = device(hidden)
    assert sum(slept) == 2.0
    output.sum().backward()
    assert sum(slept) == 6.0


def test_the_gradient_of_the_weights_can_be_put_off(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    hidden = torch.zeros(3, pipelining.WIDTH, requires_grad=True)
    device = pipelining.Device(2.0)
    output = device(hidden)
    slept.clear()
    torch.autograd.grad(output.sum(), hidden, retain_graph=True)
    assert sum(slept) == 2.0
    torch.autograd.grad(output.sum(), device.weight)
    assert sum(slept) == 4.0


def test_utilisation_is_the_time_of_the_passes_over_that_of_the_step():
    row = pipelining._row("GPipe", 2, 4, 0.5, [12.0, 6.0, 8.0])
    assert row["utilisation"] == 0.75
    assert row["range"] == [0.5, 1.0]
    assert pipelining._row("1F1B", 4, 1, 0.5, None)["utilisation"] is None


@pytest.fixture
def four_ranks():
    """The first of four processes, of which there is no other."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", pipelining.SCHEDULES)
def test_schedules_are_left_out_where_torch_refuses_them_and_nowhere_else(name, four_ranks, monkeypatch):
    emulated = pipelining.Emulated(0.0, 0.0, (), 1.0, 1.0)
    *schedule, least = pipelining.SCHEDULES[name]
    for micro_batches in (1, 2, 4, 8):
        left_out = pipelining._pipeline(name, 0, 4, micro_batches, emulated) is None
        assert left_out == (micro_batches < 4 * least)
        if left_out:
            monkeypatch.setitem(pipelining.SCHEDULES, name, (*schedule, 0))
            with pytest.raises(ValueError, match="microbatches"):
                pipelining._pipeline(name, 0, 4, micro_batches, emulated)
            monkeypatch.undo()
