"""A model of its own for every head that borrows layers: on its block's device, so that no later device is waited for.

A twin is the model once more, with the weights of what the head runs through: copies of later blocks' weights, and the
block's own. Layers that are left out have none. The twin's forward runs beside the model's own, which goes on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_blocklocal.anatomy.embeddings import input_embedding
from hf_blocklocal.assembly import Assembly
from hf_blocklocal.borrowing.shortcut import Shortcut
from hf_blocklocal.crossing import sent
from hf_blocklocal.cut.blocks import Trail
from hf_blocklocal.devices.copying import Place, Pool
from hf_blocklocal.devices.shadows import Shadows, pairs_of


@dataclass(frozen=True)
class Twin:
    """A block's own model of what its head borrows.

    Attributes:
        model: The model.
        learning: Copies of later blocks' weights that the head trains as its own.
        lent: Other copies that it uses of later blocks' weights.
    """

    model: nn.Module
    learning: frozenset[nn.Parameter]
    lent: frozenset[Place]


def make_twin(
    assembly: Assembly, block: int, device: torch.device, pool: Pool, *, used: set[str], own: set[str]
) -> Twin:
    """Make the twin of a block.

    Args:
        assembly: The model with its heads, before it is spread.
        block: The block.
        device: Its device.
        pool: Where copies of weights come from.
        used: Names of the parameters that the head uses.
        own: Names of the parameters that will lie on the block's device.
    """
    model, cut = assembly.module.model, assembly.cut
    kept = {cut.layers[index] for index in assembly.step.shortcut.kept_layers(block)}
    embedding = input_embedding(model)
    not_embedded = embedding is not None and not any(
        parameter is embedding.weight and name in used | own for name, parameter in model.named_parameters()
    )
    learning = assembly.copies.learning[block] if assembly.copies is not None else {}
    memo: dict[int, Any] = {}
    lent: set[Place] = set()
    for name, parameter in model.named_parameters():
        layer = cut.layer_of_path(name)
        is_left_out = layer is not None and cut.layers[layer] not in kept and name not in used | assembly.lent[block]
        if name in learning:
            memo[id(parameter)] = learning[name]
        elif name in own and not is_left_out:
            memo[id(parameter)] = parameter
        elif is_left_out or (not_embedded and parameter is embedding.weight):
            memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        else:
            memo[id(parameter)] = pool.copy(name, device)
            if name in assembly.lent[block]:
                lent.add((device, name))
    twin = copy.deepcopy(model, memo)
    lent |= _with_statistics_(twin, assembly, block, device, pool)
    if not_embedded:
        own_embedding = input_embedding(twin)
        own_embedding.forward = _no_embedding(embedding.weight.shape[-1], embedding.weight.dtype)
    return Twin(twin, frozenset(learning.values()), frozenset(lent))


def _with_statistics_(twin: nn.Module, assembly: Assembly, block: int, device: torch.device, pool: Pool) -> set[Place]:
    """Move the buffers of a twin to its device, and put copies in the place of the running statistics that it lends.

    Returns:
        Those copies.
    """
    for module in twin.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    copies = assembly.copies
    names = set() if copies is None else copies.lent[block] & copies.beside.keys()
    for name in names:
        path, _, leaf = name.rpartition(".")
        twin.get_submodule(path)._buffers[leaf] = pool.copy(name, device)
    return {(device, name) for name in names}


def _no_embedding(width: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return the forward of an embedding whose result nobody needs."""

    def forward(ids: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return torch.zeros(*ids.shape, width, dtype=dtype, device=ids.device)

    return forward


class Twins:
    """The way from the end of each block to the model's logits, through twins: what a `LocalStep` calls its shortcut.

    Args:
        shortcut: The way through the model itself.
        twins: The twin of every block but the last.
        devices: The device of each block.
    """

    def __init__(self, shortcut: Shortcut, twins: Sequence[Twin], devices: Sequence[torch.device]) -> None:
        self.confines = shortcut.confines
        self._model, self._twins, self._devices = shortcut.model, twins, devices
        self._ways = [shortcut.through(twin.model, learning=twin.learning) for twin in twins]

    def logits(
        self, block: int, hidden: Tensor, inputs: Mapping[str, Any], trail: Trail, *others: Any, **options: Any
    ) -> Tensor:
        """Run a block's twin from the end of the block on; see `Shortcut.logits`."""
        twin, device = self._twins[block].model, self._devices[block]
        # In place, so that in training the next block has them from here; where they began, a device would wait.
        trail.ends.update({layer: sent(end, device) for layer, end in trail.ends.items()})
        if twin.training != self._model.training:
            twin.train(self._model.training)
        sent_here = {name: sent(value, device) for name, value in inputs.items() if isinstance(value, Tensor)}
        here = {**inputs, **sent_here}
        with Shadows(pairs_of(here, inputs)):
            return self._ways[block].logits(block, hidden, here, trail, *others, **options)

    def lent(self, block: int, *, head_only: bool = False) -> AbstractContextManager[None]:
        """Leave the running statistics of a twin alone, and with `head_only` the block's own parameters in it."""
        return self._ways[block].lent(block, head_only=head_only)
