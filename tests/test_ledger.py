"""What is not finite is noted on its device, and told with block and step when somebody looks."""

from __future__ import annotations

import pytest
import torch
from several_devices import Machine, device

from hf_blocklocal.devices.ledger import Ledger
from hf_blocklocal.errors import NonFiniteLossError
from hf_blocklocal.teaching.report import StepReport


def losses(*values):
    return StepReport([torch.tensor(value, device=device(block)) for block, value in enumerate(values)])


def norms(*values):
    return {block: torch.tensor(value, device=device(block)) for block, value in enumerate(values)}


@pytest.fixture
def machine():
    with Machine().running() as machine:
        yield machine


def test_nothing_is_read_before_somebody_looks(machine):
    ledger, report, gradients = Ledger(), losses(1.0, float("nan")), norms(1.0, 2.0)
    machine.forget()
    for step in (1, 2):
        ledger.note_losses(report, step)
        ledger.note_norms(gradients, step)
        ledger.keep_norms(list(gradients.values()))
    assert machine.waits == machine.copies == []


def test_finite_numbers_pass(machine):
    ledger = Ledger()
    ledger.check(0)
    for step in range(1, 4):
        ledger.note_losses(losses(1.0, 2.0), step)
        ledger.note_norms(norms(3.0, 4.0), step)
        ledger.keep_norms(list(norms(3.0, 4.0).values()))
    ledger.check(3)
    assert ledger.grad_norm == 5.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_bad_step_is_told_with_its_block(machine, bad):
    ledger = Ledger()
    for step, second in enumerate((1.0, bad, bad, 1.0), 1):
        ledger.note_losses(losses(1.0, second), step)
        ledger.note_norms(norms(1.0, second), step)
    with pytest.raises(NonFiniteLossError, match="loss of block 1 was not finite at step 2, as is seen after step 4"):
        ledger.check(4)


def test_a_gradient_can_be_bad_where_no_loss_was(machine):
    ledger = Ledger()
    ledger.note_losses(losses(1.0, 1.0), 1)
    ledger.note_norms(norms(float("inf"), 1.0), 1)
    with pytest.raises(NonFiniteLossError, match="The gradient of block 0 was not finite at step 1"):
        ledger.check(1)
