"""Give what one process has to others: weights to all, the results of the last block to its chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_blocklocal.parallel.chain import Chain
from hf_blocklocal.parallel.wire import TensorForm, decoded, encoded, put_together, take_apart


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
    message = encoded({"value": description, "forms": [astuple(TensorForm.of(tensor)) for tensor in tensors]})
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
