"""Average the gradients of one block over the processes that hold a copy of it.

Done by hand, block by block, because `DistributedDataParallel` expects one backward pass after one forward pass. The
averaging of a block runs while the next block computes. No number is read for that, which would make the host wait for
its GPU, unless a parameter has no gradient here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_blocklocal.crossing import sent


class GradientAverager:
    """Averages gradients over all processes; does nothing with one.

    Args:
        world_size: Processes, each of which holds a copy.
        group: Group of those processes; all there are by default.
        together: Runs a function in which this process waits for others.
    """

    def __init__(
        self,
        world_size: int,
        group: dist.ProcessGroup | None = None,
        together: Callable[[Callable[[], Any]], Any] = lambda wait: wait(),
    ) -> None:
        self.world_size = world_size
        self.group = group
        self._together = together
        self._pending: list[_Bucket] = []

    def start(self, parameters: Sequence[nn.Parameter]) -> None:
        """Send off the gradients of a block without waiting. Every process must do so in the same order of blocks."""
        if self.world_size == 1:
            return
        by_kind: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            if parameter.requires_grad:
                by_kind[parameter.dtype, parameter.device].append(parameter)
        self._pending.extend(_Bucket(bucket, self.group) for bucket in by_kind.values())

    def finish(self) -> None:
        """Wait for all gradients sent off so far and put the averages in place."""
        if self._pending:
            self._together(lambda: [bucket.work.wait() for bucket in self._pending])
        for bucket in self._pending:
            bucket.finish(self.world_size)
        self._pending.clear()


class _Bucket:
    """Gradients of one dtype on one device, flat, followed by a flag per parameter that tells whether it had one."""

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None) -> None:
        self.parameters = parameters
        self.present = [parameter.grad is not None for parameter in parameters]
        pieces = [
            (parameter.grad if has else torch.zeros_like(parameter)).reshape(-1)
            for parameter, has in zip(parameters, self.present, strict=True)
        ]
        flags = sent(torch.tensor(self.present, dtype=pieces[0].dtype), pieces[0].device)
        self.flat = torch.cat([*pieces, flags])
        self.work = dist.all_reduce(self.flat, async_op=True, group=group)

    def finish(self, world_size: int) -> None:
        self.work.wait()
        # What has a gradient here has one: only where one is missing do the others matter.
        flags = self.present if all(self.present) else self.flat[-len(self.parameters) :].tolist()
        sizes = [parameter.numel() for parameter in self.parameters]
        gradients = self.flat[: -len(self.parameters)].div_(world_size).split(sizes)
        for parameter, gradient, flag in zip(self.parameters, gradients, flags, strict=True):
            if flag:
                parameter.grad = gradient.view_as(parameter)
