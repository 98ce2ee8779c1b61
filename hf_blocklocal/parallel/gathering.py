"""Bring together what the processes of block-parallel training hold: weights, predictions, results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_blocklocal.parallel.chain import Chain
from hf_blocklocal.parallel.stream import HEADER_BYTES
from hf_blocklocal.parallel.wire import TensorForm, decoded, encoded, put_together, take_apart


def gather_to_first(chain: Chain, tensors: Mapping[str, Tensor], facts: Any = None) -> tuple[dict[str, Tensor], list]:
    """Collect named tensors from all blocks at the process that writes checkpoints, one tensor at a time.

    All processes must call it. Only those of the first chain, of which the others are copies, say anything.

    Args:
        chain: The place of this process.
        tensors: What this process holds.
        facts: Anything else that it has to say, JSON-able or of plain values.

    Returns:
        At rank 0 the tensors of all blocks, on the CPU, and what each block had to say; elsewhere nothing.
    """
    if chain.replica > 0:
        return {}, []
    if chain.block > 0:
        forms = [(name, *_form(tensor)) for name, tensor in tensors.items()]
        dist.send_object_list([forms, facts], dst=0, group=chain.control)
        for tensor in tensors.values():
            dist.send(tensor.detach().contiguous().cpu(), 0, group=chain.control)
        return {}, []
    together, said = {name: tensor.detach().cpu() for name, tensor in tensors.items()}, [facts]
    for rank in range(1, chain.num_blocks):
        told: list[Any] = [None, None]
        dist.recv_object_list(told, src=rank, group=chain.control)
        for name, dtype, shape in told[0]:
            together[name] = TensorForm(dtype, shape).empty(torch.device("cpu"))
            dist.recv(together[name], rank, group=chain.control)
        said.append(told[1])
    return together, said


def give_to_all(chain: Chain, tensors: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every process what the one that writes checkpoints has gathered, one tensor at a time.

    Args:
        chain: The place of this process.
        tensors: What has been gathered, on the CPU; looked at only there.
        names: Tensors of the same names, shapes and dtypes, values aside, in the same order in all processes.
    """
    given = {}
    for name, form in names.items():
        given[name] = tensors[name].contiguous() if chain.writes else torch.empty_like(form, device="cpu")
        dist.broadcast(given[name], 0, group=chain.control)
    return given


def share_from_last(chain: Chain, value: Any, device: torch.device) -> Any:
    """Give all processes of a chain what the one with the last block has.

    Args:
        chain: The place of this process.
        value: What is to be shared; looked at only where the last block is.
        device: Where the tensors in it are, or are to be.
    """
    source, header = chain.last_rank, torch.empty(HEADER_BYTES, dtype=torch.uint8)
    tensors: list[Tensor] = []
    if chain.is_last:
        description, tensors = take_apart(value)
        header = encoded({"value": description, "forms": [_form(tensor) for tensor in tensors]}, HEADER_BYTES)
    dist.broadcast(header, source, group=chain.control_of_blocks)
    said = decoded(header)
    shared = []
    for place, (dtype, shape) in enumerate(said["forms"]):
        tensor = tensors[place].contiguous() if chain.is_last else TensorForm(dtype, tuple(shape)).empty(device)
        dist.broadcast(tensor, source, group=chain.blocks)
        shared.append(tensor)
    return put_together(said["value"], shared)


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
        dist.all_gather(parts, value.contiguous(), group=chain.replicas)
        value = torch.cat(parts)
    cut_off = gradient_state.end_of_dataloader and gradient_state.remainder > 0
    return value[: gradient_state.remainder] if cut_off else value


def sum_over_blocks(chain: Chain, values: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes of a chain."""
    values = values.clone()
    dist.all_reduce(values, group=chain.blocks)
    return values


def _form(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    form = TensorForm.of(tensor)
    return form.dtype, form.shape
