"""The emulated device of the pipelining benchmark sleeps when it should, and its rows are what was measured."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch


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
