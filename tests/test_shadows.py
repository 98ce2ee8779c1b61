"""What is made of a batch alone is answered from main memory, and is what the device would have answered."""

from __future__ import annotations

import pytest
import torch
from several_devices import CPU, Machine, device
from torch import Tensor

from hf_blocklocal.anatomy import answers
from hf_blocklocal.crossing import sent
from hf_blocklocal.devices.shadows import Shadows, pairs_of


MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])


@pytest.fixture
def machine():
    with Machine().running() as machine:
        yield machine


def questions(mask: Tensor, hidden: Tensor) -> list:
    """Ask what models ask of their inputs."""
    ids = torch.arange(4, device=mask.device)
    upside_down = ~mask.bool()
    upside_down[0, 0] = True
    rest = mask.clone()
    rest += 1
    found = (mask == 0).nonzero()
    kept = hidden.clone()
    kept[mask == 0] = 0.0
    return [
        bool(mask.all()),
        mask[:, :2].all().item(),
        int(mask.sum()),
        mask[:, ids].tolist(),
        upside_down.tolist(),
        rest.sum().item(),
        found.shape[0],
        torch.cat([mask, mask]).sum().item(),
        torch.where(mask == 0)[0].shape[0],
        len(hidden[mask.bool()]),
        kept,
    ]


def test_answers_are_those_of_the_device_and_nobody_waits(machine):
    hidden = torch.randn(2, 4, 3)
    expected = questions(MASK, hidden)
    there, hidden_there = sent(MASK, device(1)), sent(hidden, device(1))
    with Shadows([(there, MASK)]):
        answers = questions(there, hidden_there)
    assert machine.waits == []
    assert answers[:-1] == expected[:-1]
    assert answers[-1].device == device(1)
    assert torch.equal(answers[-1].to(CPU), expected[-1])
    questions(there, hidden_there)
    assert len(machine.waits) > 5  # without


def test_a_batch_stays_as_it_was_where_a_model_changes_its_own(machine):
    batch = {"mask": MASK.clone(), "pixels": torch.ones(2), "name": "text"}
    placed = {name: sent(value, device(0)) if name != "name" else value for name, value in batch.items()}
    with Shadows(pairs_of(placed, batch)):
        placed["mask"].fill_(1)
        assert placed["mask"].all()
    assert machine.waits == []
    assert torch.equal(batch["mask"], MASK)


def test_what_is_wanted_elsewhere_comes_from_main_memory(machine):
    mask = sent(MASK, device(0))
    machine.forget()
    with Shadows([(mask, MASK)]):
        moved = (mask != 0).to(device(2), torch.int32)
        scaled = torch.ones(2, 4, device=device(2)) * mask
    assert moved.device == scaled.device == device(2)
    assert moved.dtype == torch.int32
    assert {(copy.source, copy.target) for copy in machine.copies} == {(CPU, device(2))}
    assert machine.waits == []
    assert torch.equal(moved.to(CPU), MASK.int())


def test_a_mask_that_a_device_changes_is_asked_there(machine):
    mask, other = sent(MASK, device(0)), sent(1 - MASK, device(0))
    with Shadows([(mask, MASK.clone())]):
        mask.add_(other)  # whose values nobody here knows
        assert mask.all()
    assert [wait[1] for wait in machine.waits] == ["_local_scalar_dense"]


@pytest.mark.parametrize("make", [lambda mask: mask * 0.5, lambda mask: torch.randint_like(mask, 2)])
def test_real_and_random_numbers_are_left_to_the_device(machine, make):
    mask = sent(MASK, device(0))
    with Shadows([(mask, MASK)]):
        bool(make(mask).sum() > 0)
    assert len(machine.waits) == 1


def test_large_tensors_are_left_to_the_device(machine, monkeypatch):
    mask = sent(MASK, device(0))
    monkeypatch.setattr(answers, "LARGEST", 8)
    with Shadows([(mask, MASK)]):
        assert mask.sum() == 5
        assert machine.waits == []
        assert torch.cat([mask, mask]).sum() == 10
    assert len(machine.waits) == 1
