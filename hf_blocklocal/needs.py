"""Find out what a block must have at hand to be run by itself: parameters outside its layers, and side inputs.

A side input is what a layer is given beside its hidden state. Masks and rotary embeddings every process makes for
itself, from the batch. What depends on parameters of other blocks, such as the states of an encoder, has to come from
the block below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_blocklocal.blocks import Boundaries
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
