"""What all blocks say between two logs, kept on the device of each so that no step has to wait for it."""

# Shapes: K blocks, H blocks with a head.

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_blocklocal.optim.collectives import average_over_processes


class BlockLossMeter:
    """Sums the loss of every block over micro-batches and divides by optimizer steps, as `Trainer` does with one.

    In a global step only the last block has a loss; the means of the others are over the steps that had theirs. Where
    backward messages are learned, the halves of a block's bound are summed too, and divided by targets.

    Args:
        alone: The block that is in this process, if the others are elsewhere.
    """

    def __init__(self, alone: int | None = None) -> None:
        self.alone = alone
        self.skipped_batches = 0
        self._forget()

    def _forget(self) -> None:
        self._sums_K: list[Tensor] = []
        self._last_alone: Tensor | None = None
        self._local_steps = 0
        self._global_steps = 0
        self._halves_H2: list[Tensor] = []
        self._targets = 0

    @property
    def steps(self) -> int:
        """Optimizer steps since the last logs."""
        return self._local_steps + self._global_steps

    def add(
        self, losses: Sequence[Tensor], *, halves: Sequence[Tensor] = (), targets: int = 0, completes_step: bool
    ) -> None:
        """Add one micro-batch.

        Args:
            losses: Loss of every block that is here.
            halves: For every such block but the last, the two halves of its bound, summed over targets; empty if no
                backward message is learned.
            targets: How many targets those sums are over.
            completes_step: Whether it is the last one of its optimizer step.
        """
        self._sums_K = _sum(self._sums_K, losses)
        if halves:
            self._halves_H2 = _sum(self._halves_H2, halves)
            self._targets += targets
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

    def pop(
        self,
        num_blocks: int,
        device: torch.device,
        world_size: int,
        *,
        overflows: Mapping[int, Tensor] | None = None,
    ) -> dict[str, float]:
        """Return the logs since the last call, averaged over processes, and this process's skipped batches so far.

        `block_k/loss` of blocks that had none, because all steps were global, is left out. `block_k/kl` and
        `block_k/nll`, in nats per target, are there where backward messages are learned, `block_k/overflows` where
        steps have been left out.

        Args:
            num_blocks: Blocks, K.
            device: Where processes meet.
            world_size: Processes; all of them must call.
            overflows: Steps that blocks here have left out so far.
        """
        sums_K = torch.zeros(num_blocks, device=device)
        if self._sums_K:
            sums_K[self._here(num_blocks)] = torch.stack([total.to(device) for total in self._sums_K])
        steps_K = torch.full_like(sums_K, max(self._local_steps, 1))
        if self._global_steps > 0:
            steps_K[-1] = self._local_steps + self._global_steps
            sums_K[-1] += 0 if self._last_alone is None else self._last_alone.to(device)
        halves_H2 = torch.zeros(num_blocks - 1, 2, device=device)
        if self._halves_H2:
            halves_H2[self._here(num_blocks - 1)] = torch.stack([total.to(device) for total in self._halves_H2])
        left_out_K = torch.zeros(num_blocks, device=device)
        for block, count in (overflows or {}).items():
            left_out_K[block] = count.to(device)
        said = [sums_K / steps_K, halves_H2.flatten(), left_out_K, sums_K.new_tensor([self._targets])]
        if self.alone is not None:  # each of these numbers is known to one process in K
            said[:3] = [num_blocks * values for values in said[:3]]
            said[3] *= num_blocks / (num_blocks - 1)  # the last block, which has no head, counts none
        # One vector of the same length in every process, one of which may have skipped all its batches.
        *values, targets = average_over_processes(torch.cat(said), world_size).tolist()
        values, left_out = values[:-num_blocks], values[-num_blocks:]
        first = num_blocks - 1 if self._global_steps > 0 and self._local_steps == 0 else 0
        self._forget()
        logs = {f"block_{block}/loss": values[block] for block in range(first, num_blocks)}
        if targets > 0:
            for block, half in enumerate(range(num_blocks, len(values), 2)):
                logs[f"block_{block}/kl"], logs[f"block_{block}/nll"] = (x / targets for x in values[half : half + 2])
        logs |= {f"block_{block}/overflows": count for block, count in enumerate(left_out) if count > 0}
        return logs | ({"skipped_batches": self.skipped_batches} if self.skipped_batches else {})

    def _here(self, count: int) -> slice:
        return slice(count) if self.alone is None else slice(self.alone, self.alone + 1)


def _sum(so_far: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """Return values added to the sums so far, each where it is."""
    values = [value.float() for value in values]
    return [total + value for total, value in zip(so_far, values, strict=True)] if so_far else values
