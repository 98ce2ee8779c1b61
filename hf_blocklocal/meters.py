"""Losses of all blocks between two logs, kept on their device so that no step has to wait for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_blocklocal.data_parallel import average_over_processes


class BlockLossMeter:
    """Sums the loss of every block over micro-batches and divides by optimizer steps, as `Trainer` does with one.

    In a global step only the last block has a loss; the means of the others are over the steps that had theirs.
    """

    def __init__(self) -> None:
        self.skipped_batches = 0
        self._sums_K: Tensor | None = None
        self._last_alone: Tensor | None = None
        self._local_steps = 0
        self._global_steps = 0

    def add(self, losses: Sequence[Tensor], *, completes_step: bool) -> None:
        """Add the losses of one micro-batch."""
        device = losses[-1].device
        losses_K = torch.stack([loss.float().to(device) for loss in losses])
        self._sums_K = losses_K if self._sums_K is None else self._sums_K + losses_K
        self._local_steps += completes_step

    def add_global(self, loss: Tensor, *, completes_step: bool) -> None:
        """Add the last block's loss of one micro-batch of a global step."""
        self._last_alone = loss.float() if self._last_alone is None else self._last_alone + loss.float()
        self._global_steps += completes_step

    def skip(self, *, completes_step: bool, in_global_step: bool = False) -> None:
        """Count a micro-batch in which nothing was to be learned."""
        self.skipped_batches += 1
        if in_global_step:
            self._global_steps += completes_step
        else:
            self._local_steps += completes_step

    def pop(self, num_blocks: int, device: torch.device, world_size: int) -> dict[str, float]:
        """Return `block_k/loss` since the last call, averaged over processes, and this one's skipped batches so far.

        Blocks that had no loss, because all steps were global, are left out.

        Args:
            num_blocks: Blocks, K.
            device: Where processes meet.
            world_size: Processes; all of them must call.
        """
        sums_K = torch.zeros(num_blocks, device=device) if self._sums_K is None else self._sums_K.to(device)
        steps_K = torch.full_like(sums_K, max(self._local_steps, 1))
        if self._global_steps > 0:
            steps_K[-1] = self._local_steps + self._global_steps
            sums_K[-1] += 0 if self._last_alone is None else self._last_alone.to(device)
        means_K = average_over_processes(sums_K / steps_K, world_size)
        first = num_blocks - 1 if self._global_steps > 0 and self._local_steps == 0 else 0
        self._sums_K, self._last_alone, self._local_steps, self._global_steps = None, None, 0, 0
        logs = {f"block_{block}/loss": loss for block, loss in enumerate(means_K.tolist()) if block >= first}
        return logs | ({"skipped_batches": self.skipped_batches} if self.skipped_batches else {})
