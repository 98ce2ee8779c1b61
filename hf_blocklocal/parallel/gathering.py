"""Bring together what the processes of block-parallel training hold: weights, predictions, results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_blocklocal.parallel.chain import Chain
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
    forms = [[name, *_form(tensor)] for name, tensor in tensors.items()]
    description, said = take_apart([forms, facts])
    assert not said, "facts are plain values"
    _send_bytes(encoded({"value": description}), asking, group)
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
    forms, facts = put_together(decoded(_receive_bytes(rank, gathered.chain.control_of_blocks))["value"], [])
    for place, (name, dtype, shape) in enumerate(forms):
        gathered.forms[name] = TensorForm(dtype, tuple(shape))
        gathered._places[name] = (rank, place)
    gathered.said.append(facts)


def gathered_from_chains(chain: Chain, content: bytes) -> list[bytes]:
    """Return what the first processes of all chains have, in the one that writes checkpoints; nothing in the others.

    Args:
        chain: The place of this process, which is the first of its chain.
        content: What it has.
    """
    assert chain.block == 0, "the other processes of a chain have nothing to say"
    if chain.writes:
        others = range(chain.num_blocks, chain.num_replicas * chain.num_blocks, chain.num_blocks)
        return [content, *(bytes(chain.together(_receive_bytes, rank, chain.control).numpy()) for rank in others)]
    chain.together(_send_bytes, torch.frombuffer(bytearray(content), dtype=torch.uint8), 0, chain.control)
    return []


def give_to_all(chain: Chain, tensors: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every process what the one that writes checkpoints has gathered, one tensor at a time.

    Args:
        chain: The place of this process.
        tensors: What has been gathered, on the CPU; looked at only there.
        names: Tensors of the same names, shapes and dtypes, values aside, in the same order in all processes.
    """
    given = {}
    for name, form in names.items():
        given[name] = tensors[name].contiguous() if chain.writes else TensorForm.of(form).empty(torch.device("cpu"))
        chain.together(dist.broadcast, given[name], 0, group=chain.control)
    return given


def share_from_last(chain: Chain, value: Any, device: torch.device) -> Any:
    """Give all processes of a chain what the one with the last block has.

    Args:
        chain: The place of this process.
        value: What is to be shared; looked at only where the last block is.
        device: Where the tensors in it are, or are to be.
    """
    description, tensors = take_apart(value) if chain.is_last else (None, [])
    message = encoded({"value": description, "forms": [_form(tensor) for tensor in tensors]})
    said, shared = chain.together(_share, chain, message, tensors, device)
    return put_together(said["value"], shared)


def _share(
    chain: Chain, message: Tensor, tensors: Sequence[Tensor], device: torch.device
) -> tuple[dict[str, Any], list[Tensor]]:
    source, length = chain.last_rank, torch.tensor([len(message)])
    dist.broadcast(length, source, group=chain.control_of_blocks)
    if not chain.is_last:
        message = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(message, source, group=chain.control_of_blocks)
    said, shared = decoded(message), []
    for place, (dtype, shape) in enumerate(said["forms"]):
        tensor = tensors[place].contiguous() if chain.is_last else TensorForm(dtype, tuple(shape)).empty(device)
        dist.broadcast(tensor, source, group=chain.blocks)
        shared.append(tensor)
    return said, shared


def gather_samples(chain: Chain, value: Any, gradient_state: Any) -> Any:
    """Put together what the chains have of a batch, without samples that only fill it.

    Args:
        chain: The place of this process.
        value: Tensors with a first dimension of samples, nested in any way, of the same shapes in all chains.
        gradient_state: accelerate's note of whether this is the last batch, and how many samples of it count.
    """
    if isinstance(value, Mapping):
        return type(value)({key: gather_samples(chain, item, gradient_state) for key, item in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(gather_samples(chain, item, gradient_state) for item in value)
    if not isinstance(value, Tensor):
        return value
    if chain.num_replicas > 1:
        parts = [torch.empty_like(value) for _ in range(chain.num_replicas)]
        chain.together(dist.all_gather, parts, value.contiguous(), group=chain.replicas)
        value = torch.cat(parts)
    cut_off = gradient_state.end_of_dataloader and gradient_state.remainder > 0
    return value[: gradient_state.remainder] if cut_off else value


def sum_over_blocks(chain: Chain, values: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes of a chain."""
    values = values.clone()
    chain.together(dist.all_reduce, values, group=chain.blocks)
    return values


def _send_bytes(content: Tensor, rank: int, group: dist.ProcessGroup) -> None:
    dist.send(torch.tensor([len(content)]), rank, group=group)
    dist.send(content, rank, group=group)


def _receive_bytes(rank: int, group: dist.ProcessGroup) -> Tensor:
    length = torch.empty(1, dtype=torch.int64)
    dist.recv(length, rank, group=group)
    content = torch.empty(int(length), dtype=torch.uint8)
    dist.recv(content, rank, group=group)
    return content


def _form(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    form = TensorForm.of(tensor)
    return form.dtype, form.shape
