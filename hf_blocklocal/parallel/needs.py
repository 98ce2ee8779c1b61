"""Find out what a block must have at hand to be run by itself: parameters outside its layers, and side inputs.

A side input is what a layer is given beside its hidden state. Masks and rotary embeddings every process makes for
itself, from the batch. What depends on parameters of other blocks, such as the states of an encoder, has to come from
the block below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_blocklocal.anatomy import outputs_not_recorded
from hf_blocklocal.assembly import Assembly
from hf_blocklocal.blocks import Boundaries, reached_parameters
from hf_blocklocal.errors import UnsupportedSettingError
from hf_blocklocal.signals import map_tensors
from hf_blocklocal.trace import evaluation_mode, trace_reach


@dataclass(frozen=True)
class Needs:
    """What each block needs.

    Attributes:
        parameters: For each block, the names of the parameters that its output depends on, trainable or not.
        side_inputs: For each block, positions and names of the arguments of its layers that must come from below.
    """

    parameters: tuple[frozenset[str], ...]
    side_inputs: tuple[frozenset[int | str], ...]


def trace_needs(model: nn.Module, boundaries: Boundaries, inputs: Mapping[str, Any]) -> Needs:
    """Run a whole model once, cut, and write down what each block has made use of.

    Args:
        model: The model.
        boundaries: Its cut.
        inputs: A small batch with labels, on the model's device.

    Raises:
        CutError: If the model cannot be cut here.
    """
    cut = boundaries.cut
    side_inputs: list[set[int | str]] = [set() for _ in cut.spans]

    def observe(layer: int, name: int | str, value: Any) -> None:
        needed: list[bool] = []
        map_tensors(value, lambda tensor: needed.append(tensor.requires_grad))
        if any(needed):
            side_inputs[cut.block_of_layer(layer)].add(name)

    with everything_trainable(model), evaluation_mode(model):
        parameters = trace_reach(model, boundaries, inputs, hand_on=_marked, observe=observe)
    return Needs(tuple(map(frozenset, parameters)), tuple(map(frozenset, side_inputs)))


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
                "which an earlier block trains, and with a process per block weights only travel from later blocks to "
                "earlier ones. Use heads of their own (head_layers=0), 2 blocks, or freeze what is named."
            )


def _marked(hidden: Tensor) -> Tensor:
    """Return what a block hands on, such that what is made of it can be told from what every process can make."""
    return hidden.detach().requires_grad_().clone()


@contextmanager
def everything_trainable(model: nn.Module) -> Iterator[None]:
    """Let gradients reach frozen parameters too, inside the `with`."""
    frozen = [p for p in model.parameters() if not p.requires_grad and torch.is_floating_point(p)]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
