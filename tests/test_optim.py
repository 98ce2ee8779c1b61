"""Blocks are clipped each by itself, and stepped one by one as if they were stepped together."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from hf_blocklocal.errors import UnsupportedSettingError
from hf_blocklocal.optim.clipping import clip_block_, total_norm
from hf_blocklocal.optim.stepping import check_steps_by_block, step_block_


def adamw(groups):
    return torch.optim.AdamW(groups, lr=0.1, weight_decay=0.3)


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)


def adafactor(groups):
    return Adafactor(groups, lr=0.1, scale_parameter=True, relative_step=False, beta1=0.9)


def adafactor_relative(groups):
    return Adafactor(groups, scale_parameter=True, relative_step=True, warmup_init=True)


OPTIMIZERS = pytest.mark.parametrize("make", [adamw, sgd, adafactor, adafactor_relative])


def three_blocks():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.ModuleList(nn.Linear(3, 3) for _ in range(3))


def groups_of(model):
    """Split the parameters as the Trainer does: weights, which decay, and biases, which do not."""
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    biases = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    return [{"params": weights}, {"params": biases, "weight_decay": 0.0}]


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def state_of(optimizer):
    state = optimizer.state_dict()
    return [(number, key, value) for number, entry in sorted(state["state"].items()) for key, value in entry.items()]


@OPTIMIZERS
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_stepping_block_by_block_is_stepping_all_at_once_to_the_bit(make, order):
    together, apart = three_blocks(), three_blocks()
    of_all, of_each = make(groups_of(together)), make(groups_of(apart))
    start = copy.deepcopy(together.state_dict())
    for seed in range(4):
        give_gradients(together, seed)
        give_gradients(apart, seed)
        of_all.step()
        for block in order:
            step_block_(of_each, list(apart[block].parameters()))
    for name, weight in together.state_dict().items():
        assert torch.equal(weight, apart.state_dict()[name])
        assert not torch.equal(weight, start[name])
    expected, found = state_of(of_all), state_of(of_each)
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    assert all(torch.equal(torch.as_tensor(a[2]), torch.as_tensor(b[2])) for a, b in zip(found, expected, strict=True))


@OPTIMIZERS
def test_a_step_touches_one_block_and_frees_its_gradients(make):
    model = three_blocks()
    optimizer = make(groups_of(model))
    before = copy.deepcopy(model.state_dict())
    give_gradients(model, 0)
    step_block_(optimizer, list(model[1].parameters()))
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"1.weight", "1.bias"}
    assert [parameter.grad is None for parameter in model.parameters()] == [False, False, True, True, False, False]


def test_a_learning_rate_changed_between_two_steps_is_heeded():
    together, apart = three_blocks(), three_blocks()
    of_all, of_each = adamw(groups_of(together)), adamw(groups_of(apart))
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5) for optimizer in (of_all, of_each)]
    for seed in range(3):
        give_gradients(together, seed)
        give_gradients(apart, seed)
        of_all.step()
        for block in apart:
            step_block_(of_each, list(block.parameters()))
        for schedule in schedules:
            schedule.step()
    assert of_each.param_groups[0]["lr"] == 0.1 / 8
    assert all(torch.equal(a, b) for a, b in zip(together.parameters(), apart.parameters(), strict=True))


def test_the_optimizer_has_its_groups_back_after_a_step_and_after_an_exception():
    model = three_blocks()
    optimizer = adamw(groups_of(model))
    groups = optimizer.param_groups
    give_gradients(model, 0)
    step_block_(optimizer, list(model[0].parameters()))
    assert optimizer.param_groups is groups

    def fail(*_args, **_kwargs):
        raise ArithmeticError("on purpose")

    optimizer.step = fail
    with pytest.raises(ArithmeticError):
        step_block_(optimizer, list(model[1].parameters()))
    assert optimizer.param_groups is groups
    assert [len(group["params"]) for group in groups] == [3, 3]


# ---- Norms ----


def test_a_block_is_scaled_down_to_the_norm():
    block = three_blocks()[0]
    give_gradients(block, 0)
    before = [parameter.grad.clone() for parameter in block.parameters()]
    size = math.sqrt(sum(gradient.square().sum().item() for gradient in before))
    norm = clip_block_(list(block.parameters()), 0.5)
    assert norm.item() == pytest.approx(size)
    for parameter, gradient in zip(block.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * 0.5 / size, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_norm", [100.0, float("inf")])
def test_a_block_within_the_norm_is_left_as_it_is(max_norm):
    block = three_blocks()[0]
    give_gradients(block, 0)
    before = [parameter.grad.clone() for parameter in block.parameters()]
    assert clip_block_(list(block.parameters()), max_norm) > 0
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(block.parameters(), before, strict=True))


def test_other_blocks_have_no_say_in_the_norm_of_one():
    model = three_blocks()
    give_gradients(model, 0)
    others = [parameter.grad.clone() for parameter in model[1:].parameters()]
    clip_block_(list(model[0].parameters()), 0.5)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model[1:].parameters(), others, strict=True))


def test_parameters_without_gradient_do_not_count():
    block = three_blocks()[0]
    block.weight.grad = torch.full((3, 3), 2.0)
    assert clip_block_(list(block.parameters()), float("inf")).item() == pytest.approx(6.0)
    assert block.bias.grad is None


def test_a_block_without_any_gradient_has_no_norm():
    assert clip_block_(list(three_blocks()[0].parameters()), 1.0) is None
    assert clip_block_([], 1.0) is None


def test_the_total_norm_is_that_of_all_gradients_together():
    model = three_blocks()
    give_gradients(model, 0)
    norms = [clip_block_(list(block.parameters()), float("inf")) for block in model]
    expected = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(total_norm([*norms, None]), expected)


def test_a_single_block_has_its_own_norm_to_the_bit():
    norm = torch.tensor(0.1).sqrt()
    assert torch.equal(total_norm([None, norm]), norm)


@pytest.mark.parametrize("norms", [[], [None, None]])
def test_no_gradient_has_no_length(norms):
    assert total_norm(norms).item() == 0.0


# ---- Refusals ----


class ScheduleFreeLike(torch.optim.SGD):
    """Keeps an average of all parameters, between which `train` and `eval` switch."""

    def train(self):
        """Go back to the weights that are trained."""


def test_an_optimizer_with_a_mode_of_training_is_refused():
    optimizer = ScheduleFreeLike(three_blocks().parameters(), lr=0.1)
    with pytest.raises(UnsupportedSettingError) as error:
        check_steps_by_block(optimizer)
    assert str(error.value) == (
        "step_per_block=True needs an optimizer whose state is kept per parameter, and ScheduleFreeLike keeps some "
        "for all of them. Use step_per_block=False: the weights come out the same."
    )


def test_an_optimizer_without_groups_is_refused():
    optimizer = sgd(groups_of(three_blocks()))
    optimizer.param_groups = []
    with pytest.raises(UnsupportedSettingError, match="SGD keeps some for all of them"):
        check_steps_by_block(optimizer)


@OPTIMIZERS
def test_optimizers_that_keep_their_state_per_parameter_are_welcome(make):
    check_steps_by_block(make(groups_of(three_blocks())))


class CountsInItsGroups(torch.optim.SGD):
    """Keeps its number of steps in the groups, as the `stable_adamw` of transformers does."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad, alpha=group["lr"] / group["count"])


def test_an_optimizer_that_counts_in_its_groups_counts_once_for_all_blocks():
    joint, by_block = three_blocks(), three_blocks()
    for model, stepped_early in ((joint, 0), (by_block, 2)):
        optimizer = CountsInItsGroups(groups_of(model), lr=0.1)
        for step in range(3):
            give_gradients(model, step)
            for block in list(model)[:stepped_early]:
                step_block_(optimizer, list(block.parameters()))
            optimizer.step()  # the Trainer's own: the last block, or all of them
            optimizer.zero_grad()
        assert {group["count"] for group in optimizer.param_groups} == {3}
    assert all(torch.equal(a, b) for a, b in zip(joint.parameters(), by_block.parameters(), strict=True))
