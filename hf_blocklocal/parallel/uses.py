"""Find out what the heads of blocks use of a model, and refuse heads that would need what blocks below train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_blocklocal.anatomy.modes import evaluation_mode, everything_trainable, outputs_not_recorded
from hf_blocklocal.assembly import Assembly
from hf_blocklocal.cut.trace import reached_parameters
from hf_blocklocal.errors import UnsupportedSettingError


def used_by_heads(assembly: Assembly, inputs: Mapping[str, Any]) -> list[set[str]]:
    """Find out what the heads of a model borrow from it.

    Args:
        assembly: The model with heads that borrow layers, on one device.
        inputs: A small batch with labels, on that device.

    Returns:
        For each block but the last, the names of the parameters that its logits depend on.
    """
    model, step = assembly.module.model, assembly.step
    names = {parameter: name for name, parameter in model.named_parameters()}
    used: list[set[str]] = []

    def leave(block: int, hidden: Tensor, _router_logits: tuple[Tensor, ...]) -> None:
        with outputs_not_recorded(), step.boundaries.suspended():
            logits = step.shortcut.logits(block, hidden.detach(), inputs, step.boundaries.trail.detached())
        used.append({names[parameter] for parameter in reached_parameters(logits)})

    with everything_trainable(model), evaluation_mode(model), torch.enable_grad(), step.boundaries.attached(leave):
        model(**inputs)
    return used


def check_heads_look_up(assembly: Assembly, used: Sequence[set[str]]) -> None:
    """Refuse heads that would need what blocks below are training: weights only travel down a chain.

    Args:
        assembly: The whole model with heads that borrow layers.
        used: What they use, as `used_by_heads` has found out.

    Raises:
        UnsupportedSettingError: For the first such head.
    """
    model, owners = assembly.module.model, assembly.owners
    for block, names in enumerate(used):
        below = sorted(name for name in names if owners[name] < block and model.get_parameter(name).requires_grad)
        if below:
            raise UnsupportedSettingError(
                f"The head of block {block} of {type(model).__name__} borrows layers that use {', '.join(below)}, "
                "which an earlier block trains, and where blocks are apart weights only travel from later blocks to "
                "earlier ones. Use heads of their own (head_layers=0), 2 blocks, or freeze what is named."
            )
