"""Find out what a block must have at hand to be run by itself: parameters outside its layers, and side inputs.

A side input is what a layer is given beside its hidden state. Masks and rotary embeddings every process makes for
itself, from the batch. What depends on parameters of other blocks, such as the states of an encoder, has to come from
the block below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_blocklocal.anatomy.signals import map_tensors
from hf_blocklocal.cut.blocks import Boundaries
from hf_blocklocal.cut.trace import trace_reach


@dataclass(frozen=True)
class Needs:
    """What each block needs.

    Attributes:
        parameters: For each block, the names of the parameters that its output depends on, trainable or not.
        side_inputs: For each block, positions and names of the arguments of its layers that must come from below.
        lasting: Those of them, by stack of layers, whose values are the same for all layers that are given them.
    """

    parameters: tuple[frozenset[str], ...]
    side_inputs: tuple[frozenset[int | str], ...]
    lasting: Mapping[int, frozenset[int | str]]


def trace_needs(
    model: nn.Module, boundaries: Boundaries, inputs: Mapping[str, Any], *, has_values: bool = True
) -> Needs:
    """Run a whole model once, cut, and write down what each block has made use of.

    Args:
        model: The model.
        boundaries: Its cut.
        inputs: A small batch with labels, on the model's device.
        has_values: Whether the tensors hold values. Without, all side inputs count as lasting.

    Raises:
        CutError: If the model cannot be cut here.
    """
    cut = boundaries.cut
    side_inputs: list[set[int | str]] = [set() for _ in cut.spans]
    values: dict[tuple[int, int | str], list[Tensor]] = {}
    changing: set[tuple[int, int | str]] = set()

    def observe(layer: int, name: int | str, value: Any) -> None:
        tensors: list[Tensor] = []
        map_tensors(value, tensors.append)
        if not any(tensor.requires_grad for tensor in tensors):
            return
        side_inputs[cut.block_of_layer(layer)].add(name)
        key = cut.stacks[layer], name
        before = values.setdefault(key, tensors)
        if has_values and not all(map(_same, before, tensors)):
            changing.add(key)

    parameters = trace_reach(model, boundaries, inputs, hand_on=_marked, observe=observe)
    lasting = {
        stack: frozenset(name for of, name in values.keys() - changing if of == stack) for stack in set(cut.stacks)
    }
    return Needs(tuple(map(frozenset, parameters)), tuple(map(frozenset, side_inputs)), lasting)


def _same(first: Tensor, second: Tensor) -> bool:
    return first is second or (first.shape == second.shape and torch.equal(first, second))


def _marked(hidden: Tensor) -> Tensor:
    """Return what a block hands on, such that what is made of it can be told from what every process can make."""
    return hidden.detach().requires_grad_().clone()
