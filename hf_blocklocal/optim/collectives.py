"""What all processes do together: give out, add up, average, gather, and see that their models are cut alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from hf_blocklocal.errors import CutError


def broadcast_from_first(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Give every process of a group the first one's values, in place."""
    for tensor in tensors:
        dist.broadcast(tensor.detach(), group=group, group_src=0)


def sum_over_processes(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the sum of a tensor over the processes of a group, in place."""
    dist.all_reduce(values, group=group)
    return values


def average_over_processes(values: Tensor, world_size: int) -> Tensor:
    """Return the mean of a tensor over all processes."""
    if world_size > 1:
        dist.all_reduce(values)
        values /= world_size
    return values


def check_same_cut_everywhere(boundaries: Sequence[int], world_size: int) -> None:
    """Refuse to average gradients of models that are cut in different places; all processes must call it.

    Args:
        boundaries: First layer of every block but the first, as this process has it.
        world_size: Processes.

    Raises:
        CutError: If another process has another cut.
    """
    told = gather_from_processes(list(boundaries), world_size)
    if any(other != told[0] for other in told):
        cuts = ", ".join(f"rank {rank}: {other}" for rank, other in enumerate(told))
        raise CutError(
            f"balance='cost' has cut the model differently in different processes ({cuts}), because their first "
            f"batches differ. Give the cut by name: boundaries={told[0]}, without balance."
        )


def gather_from_processes(value: Any, world_size: int) -> list[Any]:
    """Return what every process has to say, a few plain values each, in the order of processes; all must call."""
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values
