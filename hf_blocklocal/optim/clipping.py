"""Clip and step the parameters of one block at a time.

Whatever couples parameters, such as a gradient norm, is taken per block: then a block is trained the same whether the
other blocks live in this process or in another one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from hf_blocklocal.errors import NonFiniteLossError, UnsupportedSettingError


def clip_block_(
    parameters: Sequence[nn.Parameter],
    max_norm: float,
    *,
    parts: Collection[nn.Parameter] = (),
    add_up: Callable[[Tensor], Tensor] | None = None,
) -> Tensor | None:
    """Scale the gradients of one block down to a norm, in place.

    Args:
        parameters: The parameters of the block; those without gradient do not count.
        max_norm: Largest norm to leave; infinity only measures.
        parts: Those of them of which other processes have the rest.
        add_up: Returns the sum of a tensor over those processes.

    Returns:
        The norm before clipping, None if no parameter has a gradient.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    if not with_gradient:
        return None
    if not parts:
        return torch.nn.utils.clip_grad_norm_(with_gradient, max_norm)
    spread = [parameter.grad for parameter in with_gradient if parameter in parts]
    whole = [parameter.grad for parameter in with_gradient if parameter not in parts]
    squares = add_up(get_total_norm(spread).square()) if spread else 0.0
    norm = (squares + get_total_norm(whole).square()).sqrt() if whole else squares.sqrt()
    clip_grads_with_norm_(with_gradient, max_norm, norm)
    return norm


def check_norms(norms: Mapping[int, Tensor], step: int) -> None:
    """Stop before a gradient that is not finite, of this process or averaged in from another, reaches a weight.

    Args:
        norms: Norm of the gradient of each block.
        step: Optimizer step under way, for the message.

    Raises:
        NonFiniteLossError: If a norm is NaN or infinite.
    """
    if not norms:
        return
    device = next(iter(norms.values())).device
    finite = torch.stack([norm.float().to(device) for norm in norms.values()]).isfinite().tolist()
    for block, is_finite in zip(norms, finite, strict=True):
        if not is_finite:
            raise NonFiniteLossError(
                f"The gradient of block {block} is not finite at step {step}. Its weights have not been touched. "
                "Lower the learning rate, look at the data of this batch, and resume from the last checkpoint."
            )


def total_norm(norms: Sequence[Tensor | None]) -> Tensor:
    """Return the norm of all blocks' gradients together."""
    known = [norm.float() for norm in norms if norm is not None]
    if not known:
        return torch.tensor(0.0)
    if len(known) == 1:
        return known[0]
    return torch.stack([norm.to(known[0].device) for norm in known]).square().sum().sqrt()


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
