"""Learning rates of their own for some parameters: optimizer groups, split where a factor asks for it.

What a group holds besides its learning rate, such as whether it decays, stands. A schedule multiplies every group, so
the proportions hold through the run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_blocklocal.errors import UnsupportedSettingError


logger = logging.getLogger(__name__)
# Marks the groups that have been split, also in a checkpoint.
_FACTOR = "learning_rate_factor"


def rates_of_blocks(num_blocks: int, decay: float | None) -> tuple[float, ...]:
    """Return the learning rate of each block as a share of the run's: `decay ** (K - 1 - k)` in block k.

    Args:
        num_blocks: The number of blocks K.
        decay: Factor from one block to the one below it; None is 1.
    """
    return tuple((decay or 1.0) ** (num_blocks - 1 - block) for block in range(num_blocks))


def factors_by_block(blocks: Sequence[Sequence[nn.Parameter]], decay: float | None) -> dict[nn.Parameter, float]:
    """Return what the learning rate of each parameter is multiplied with, that of its block.

    Args:
        blocks: The parameters of each of the K blocks and its head.
        decay: Factor from one block to the one below it; None is 1.
    """
    rates = rates_of_blocks(len(blocks), decay)
    return {parameter: rate for rate, mine in zip(rates, blocks, strict=True) for parameter in mine}


def rates_of_feedback(heads: Iterable[nn.Module], rate: float | None) -> dict[nn.Parameter, float]:
    """Return the learning rate of each parameter of a feedback network; nothing if none is asked for.

    Args:
        heads: The feedback heads.
        rate: Learning rate of their feedback networks.
    """
    return {} if rate is None else {parameter: rate for head in heads for parameter in head.feedback.parameters()}


def scale_learning_rates_(
    optimizer: torch.optim.Optimizer,
    factors: Mapping[nn.Parameter, float],
    *,
    rates: Mapping[nn.Parameter, float] | None = None,
    option: str,
    has_schedule: bool,
) -> bool:
    """Split the groups of an optimizer so that the learning rate of each parameter is multiplied with its factor.

    Within a group, parameters keep their order, the largest factor comes first, and rates of their own come last. An
    optimizer that has been split already is left alone.

    Args:
        optimizer: The optimizer, changed in place.
        factors: Factor of each parameter; 1 for those that are not mentioned.
        rates: Parameters with a learning rate of their own, in place of a factor.
        option: Option that asks for it, for messages. Empty where nobody has asked: then all parameters learn at one
            rate where it cannot be otherwise, and a warning says so.
        has_schedule: Whether a learning rate schedule has been made for the groups as they are.

    Returns:
        Whether parameters learn as was said.

    Raises:
        UnsupportedSettingError: If the optimizer chooses learning rates by itself, has no ordinary groups, or has a
            schedule already.
    """
    groups, rates = optimizer.param_groups, rates or {}
    nothing_to_do = not rates and all(factor == 1 for factor in factors.values())
    if nothing_to_do or has_rates_of_blocks(optimizer):
        return True
    name = type(optimizer).__name__
    has_no_rates = not groups or any(group.get("lr") is None for group in groups)
    if not option and (has_no_rates or has_schedule):
        reason = "keeps no rate in its groups" if has_no_rates else "came with a schedule for its groups as they are"
        logger.warning(
            "All blocks learn at one rate, because %s %s. Lower blocks of a pretrained model would learn at smaller "
            "ones. Pass optimizers=(optimizer, None) and lr_scheduler_type, or say block_lr_decay=1.",
            name,
            reason,
        )
        return False
    if has_no_rates:
        raise UnsupportedSettingError(
            f"{option} changes learning rates, and {name} keeps none in its parameter groups. Choose another "
            f"optimizer (for Adafactor: relative_step=False and a learning rate), or leave {option} out."
        )
    if has_schedule:
        raise UnsupportedSettingError(
            f"{option} splits the groups of the optimizer, and the scheduler given with {name} was made for them "
            "as they are. Pass optimizers=(optimizer, None) and the schedule by lr_scheduler_type."
        )
    # In place: some optimizers and schedules keep a reference to the list.
    groups[:] = [part for group in groups for part in _split(group, factors, rates)]
    return True


def has_rates_of_blocks(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether the groups of an optimizer have been split by `scale_learning_rates_`."""
    return any(_FACTOR in group for group in optimizer.param_groups)


def _split(
    group: Mapping[str, Any], factors: Mapping[nn.Parameter, float], rates: Mapping[nn.Parameter, float]
) -> Iterator[dict[str, Any]]:
    parts: dict[tuple[float | None, float], list[nn.Parameter]] = {}
    for parameter in group["params"]:
        rate = rates.get(parameter)
        factor = factors.get(parameter, 1.0) if rate is None else 1.0
        parts.setdefault((rate, factor), []).append(parameter)
    # A rate of its own comes last, because logs show the rate of the first group.
    for rate, factor in sorted(parts, key=lambda part: (part[0] is not None, -part[1], part[0])):
        changed = {
            name: group[name] * factor if rate is None else rate for name in ("lr", "initial_lr") if name in group
        }
        yield {**group, **changed, "params": parts[rate, factor], _FACTOR: factor}
