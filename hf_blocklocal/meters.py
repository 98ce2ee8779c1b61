"""Losses of all blocks between two logs, kept on their device so that no step has to wait for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_blocklocal.data_parallel import average_over_processes


class BlockLossMeter:
    """Sums the loss of every block over micro-batches and divides by optimizer steps, as `Trainer` does with one."""

    def __init__(self) -> None:
        self.skipped_batches = 0
        self._sums_K: Tensor | None = None
        self._steps = 0

    def add(self, losses: Sequence[Tensor], *, completes_step: bool) -> None:
        """Add the losses of one micro-batch."""
        device = losses[-1].device
        losses_K = torch.stack([loss.float().to(device) for loss in losses])
        self._sums_K = losses_K if self._sums_K is None else self._sums_K + losses_K
        self._steps += completes_step

    def skip(self, *, completes_step: bool) -> None:
        """Count a micro-batch in which nothing was to be learned."""
        self.skipped_batches += 1
        self._steps += completes_step

    def pop(self, num_blocks: int, device: torch.device, world_size: int) -> dict[str, float]:
        """Return `block_k/loss` since the last call, averaged over processes, and this one's skipped batches so far.

        Args:
            num_blocks: Blocks, K.
            device: Where processes meet.
            world_size: Processes; all of them must call.
        """
        sums_K = torch.zeros(num_blocks, device=device) if self._sums_K is None else self._sums_K.to(device)
        means_K = average_over_processes(sums_K / max(self._steps, 1), world_size)
        self._sums_K, self._steps = None, 0
        logs = {f"block_{block}/loss": loss for block, loss in enumerate(means_K.tolist())}
        return logs | ({"skipped_batches": self.skipped_batches} if self.skipped_batches else {})
