"""Learning rates of their own for some parameters: optimizer groups, split where a factor asks for it.

What a group holds besides its learning rate, such as whether it decays, stands. A schedule multiplies every group, so
the proportions hold through the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_blocklocal.errors import UnsupportedSettingError


# Marks the groups that have been split, also in a checkpoint.
_FACTOR = "learning_rate_factor"


def factors_by_block(blocks: Sequence[Sequence[nn.Parameter]], decay: float) -> dict[nn.Parameter, float]:
    """Return what the learning rate of each parameter is multiplied with: `decay ** (K - 1 - k)` in block k.

    Args:
        blocks: The parameters of each of the K blocks and its head.
        decay: Factor from one block to the one below it.
    """
    last = len(blocks) - 1
    return {parameter: decay ** (last - block) for block, mine in enumerate(blocks) for parameter in mine}


def scale_learning_rates_(
    optimizer: torch.optim.Optimizer, factors: Mapping[nn.Parameter, float], *, option: str, has_schedule: bool
) -> None:
    """Split the groups of an optimizer so that the learning rate of each parameter is multiplied with its factor.

    Within a group, parameters keep their order, and the largest factor comes first. An optimizer that has been split
    already is left alone.

    Args:
        optimizer: The optimizer, changed in place.
        factors: Factor of each parameter; 1 for those that are not mentioned.
        option: Option that asks for it, for messages.
        has_schedule: Whether a learning rate schedule has been made for the groups as they are.

    Raises:
        UnsupportedSettingError: If the optimizer chooses learning rates by itself, has no ordinary groups, or has a
            schedule already.
    """
    groups = optimizer.param_groups
    if all(factor == 1 for factor in factors.values()) or any(_FACTOR in group for group in groups):
        return
    name = type(optimizer).__name__
    if not groups or any(group.get("lr") is None for group in groups):
        raise UnsupportedSettingError(
            f"{option} multiplies learning rates, and {name} keeps none in its parameter groups. Choose another "
            f"optimizer (for Adafactor: relative_step=False and a learning rate), or leave {option} out."
        )
    if has_schedule:
        raise UnsupportedSettingError(
            f"{option} splits the groups of the optimizer, and the scheduler given with {name} was made for them "
            "as they are. Pass optimizers=(optimizer, None) and the schedule by lr_scheduler_type."
        )
    # In place: some optimizers and schedules keep a reference to the list.
    groups[:] = [part for group in groups for part in _split(group, factors)]


def _split(group: Mapping[str, Any], factors: Mapping[nn.Parameter, float]) -> Iterator[dict[str, Any]]:
    parts: dict[float, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        parts.setdefault(factors.get(parameter, 1.0), []).append(parameter)
    for factor in sorted(parts, reverse=True):
        rates = {name: group[name] * factor for name in ("lr", "initial_lr") if name in group}
        yield {**group, **rates, "params": parts[factor], _FACTOR: factor}
