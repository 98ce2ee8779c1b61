"""Step the parameters of one block at a time, with an optimizer that holds all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from torch import nn

from hf_blocklocal.errors import UnsupportedSettingError


def step_block_(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Step one block with an optimizer that holds all of them, and free the block's gradients.

    The optimizer sees, for the length of this step, copies of its groups with only the block's parameters. What it
    keeps per parameter stays; what it counts per group, it counts when it steps what is left, once for all blocks. So
    the result is the same as if all blocks were stepped at once.
    """
    mine = {id(parameter) for parameter in parameters}
    groups = optimizer.param_groups
    optimizer.param_groups = [
        {key: deepcopy(value) for key, value in group.items() if key != "params"}
        | {"params": [parameter for parameter in group["params"] if id(parameter) in mine]}
        for group in groups
    ]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups
    for parameter in parameters:
        parameter.grad = None


def add_heads_(
    optimizer: torch.optim.Optimizer,
    heads: Sequence[nn.Parameter],
    *,
    originals: Mapping[nn.Parameter, nn.Parameter],
    has_schedule: bool,
) -> None:
    """Give an optimizer that a user has made the parameters of the heads that it does not know.

    Copies of the model's weights are stepped as these are, in the same groups, or not at all where these are not;
    all else gets a group with the optimizer's defaults.

    Args:
        optimizer: The optimizer, changed in place.
        heads: The parameters of the heads.
        originals: For those of them that are copies, what they are copies of.
        has_schedule: Whether it has a learning rate schedule.

    Raises:
        UnsupportedSettingError: If it has one, and would have to get another group, which a schedule cannot.
    """
    for group in optimizer.param_groups:
        here = {id(parameter) for parameter in group["params"]}
        copies = [copy for copy, original in originals.items() if id(original) in here and id(copy) not in here]
        group["params"] += copies
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [parameter for parameter in heads if parameter not in originals and id(parameter) not in known]
    if missing and has_schedule:
        raise UnsupportedSettingError(
            "The given optimizer and scheduler do not know the feedback heads, and a scheduler cannot be extended. "
            "Pass optimizers=(optimizer, None) and the schedule by lr_scheduler_type."
        )
    if missing:
        optimizer.add_param_group({"params": missing})


def add_untied_(optimizer: torch.optim.Optimizer, untied: nn.Parameter, source: nn.Parameter) -> None:
    """Step a weight that has been untied as the one that it was tied to, in its group; not at all where that is not.

    Args:
        optimizer: The optimizer, changed in place.
        untied: The weight that the optimizer may not know yet.
        source: The weight that it was tied to.
    """
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for group in optimizer.param_groups:
        if id(untied) not in known and any(parameter is source for parameter in group["params"]):
            group["params"].append(untied)


def check_steps_by_block(optimizer: torch.optim.Optimizer) -> None:
    """Refuse to step per block an optimizer whose state is not per parameter.

    Raises:
        UnsupportedSettingError: For schedule-free optimizers and those without ordinary parameter groups.
    """
    if callable(getattr(optimizer, "train", None)) or not optimizer.param_groups:
        raise UnsupportedSettingError(
            "step_per_block=True needs an optimizer whose state is kept per parameter, and "
            f"{type(optimizer).__name__} keeps some for all of them. Use step_per_block=False: "
            "the weights come out the same."
        )
