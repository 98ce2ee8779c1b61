"""Bring named tensors of all blocks to one process, one at a time and only when it asks: weights, optimizer states.

What is spread over the processes that hold the same block is made whole on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_blocklocal.parallel.chain import Chain
from hf_blocklocal.parallel.parcels import receive_bytes, send_bytes
from hf_blocklocal.parallel.wire import TensorForm, decoded, encoded, put_together, take_apart


# What the process that collects asks for when it has all that it wants.
_ENOUGH = -1


@dataclass
class Gathered(Mapping[str, Tensor]):
    """Named tensors of all blocks, each of which comes when it is asked for, to the CPU, and is kept by nobody.

    Attributes:
        forms: What each of them is like.
        said: What each block has to say beside them.
    """

    chain: Chain
    forms: dict[str, TensorForm] = field(default_factory=dict)
    said: list[Any] = field(default_factory=list)
    _here: dict[str, tuple[int, Tensor]] = field(default_factory=dict, repr=False)
    _places: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.forms)

    def __iter__(self) -> Iterator[str]:
        return iter(self.forms)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._here:
            place, tensor = self._here[name]
            return self.chain.together(_brought, self.chain, tensor, place)
        rank, place = self._places[name]
        return self.chain.together(self._ask_for, rank, place, self.forms[name])

    def _ask_for(self, rank: int, place: int, form: TensorForm) -> Tensor:
        dist.send(torch.tensor([place]), rank, group=self.chain.control_of_blocks)
        tensor = form.empty(torch.device("cpu"))
        dist.recv(tensor, rank, group=self.chain.control_of_blocks)
        return tensor


@contextmanager
def gathered_at_first(chain: Chain, tensors: Mapping[str, Tensor], facts: Any = None) -> Iterator[Gathered]:
    """Let the process that writes checkpoints ask for named tensors of all blocks inside the `with`.

    All processes must enter it. It is `gathered_at` in the first chain; other chains are copies of that, and have an
    empty collection. What is spread over the chains, they help to bring together.
    """
    if chain.replica > 0:
        if _is_spread(tensors.values()):
            chain.together(_follow, chain, list(tensors.values()))
        yield Gathered(chain)
        return
    with gathered_at(chain, 0, tensors, facts) as gathered:
        yield gathered


@contextmanager
def gathered_at(chain: Chain, block: int, tensors: Mapping[str, Tensor], facts: Any = None) -> Iterator[Gathered]:
    """Let the process of one block of this chain ask for named tensors of all blocks inside the `with`.

    All processes of the chain must enter it. The others answer until that one has left it, and then have an empty
    collection. What is spread over several chains can be asked for in the first of them, if the others follow.

    Args:
        chain: The place of this process.
        block: The block whose process asks.
        tensors: What this process holds, under names that no other block uses.
        facts: Anything else that it has to say, of plain values.
    """
    gathered, asking = Gathered(chain), chain.first_rank + block
    others = [rank for rank in range(chain.first_rank, chain.last_rank + 1) if rank != asking]
    if chain.block != block:
        chain.together(_answer, chain, asking, tensors, facts)
        yield gathered
        return
    gathered.said.append(facts)
    gathered._here = {name: (place, tensor) for place, (name, tensor) in enumerate(tensors.items())}
    gathered.forms |= {name: TensorForm.of(tensor) for name, tensor in tensors.items()}
    for rank in others:
        chain.together(_be_told, gathered, rank)
    yield gathered
    for rank in others:
        chain.together(dist.send, torch.tensor([_ENOUGH]), rank, group=chain.control_of_blocks)
    if _is_spread(tensors.values()):
        chain.together(_lead, chain, _ENOUGH)


def _answer(chain: Chain, asking: int, tensors: Mapping[str, Tensor], facts: Any) -> None:
    """Say what there is, and send what is asked for."""
    group = chain.control_of_blocks
    forms = [[name, *astuple(TensorForm.of(tensor))] for name, tensor in tensors.items()]
    description, said = take_apart([forms, facts])
    assert not said, "facts are plain values"
    send_bytes(encoded({"value": description}), asking, group)
    here, place = list(tensors.values()), torch.empty(1, dtype=torch.int64)
    while True:
        dist.recv(place, asking, group=group)
        if place.item() == _ENOUGH:
            break
        dist.send(_brought(chain, here[place.item()], place.item()), asking, group=group)
    if _is_spread(here):
        _lead(chain, _ENOUGH)


def _is_spread(tensors: Iterable[Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def _brought(chain: Chain, tensor: Tensor, place: int) -> Tensor:
    """Return the tensor of this process that has a place among its tensors, on the CPU, whole."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        _lead(chain, place)
        tensor = tensor.full_tensor()
    return tensor.cpu().contiguous()


def _lead(chain: Chain, place: int) -> None:
    """Tell the other processes that hold this block which tensor is to be brought together."""
    dist.broadcast(torch.tensor([place]), group=chain.control_of_replicas, group_src=0)


def _follow(chain: Chain, tensors: Sequence[Tensor]) -> None:
    """Bring tensors together with the process of the first chain that holds this block, until it has enough."""
    place = torch.empty(1, dtype=torch.int64)
    while True:
        dist.broadcast(place, group=chain.control_of_replicas, group_src=0)
        if place.item() == _ENOUGH:
            return
        tensors[place.item()].detach().full_tensor()


def _be_told(gathered: Gathered, rank: int) -> None:
    """Take down what another process has."""
    forms, facts = put_together(decoded(receive_bytes(rank, gathered.chain.control_of_blocks))["value"], [])
    for place, (name, dtype, shape) in enumerate(forms):
        gathered.forms[name] = TensorForm(dtype, tuple(shape))
        gathered._places[name] = (rank, place)
    gathered.said.append(facts)
