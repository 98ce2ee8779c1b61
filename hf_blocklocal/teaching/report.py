"""What the blocks have said in one step, and whether it can be learned from."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_blocklocal.errors import NonFiniteLossError


@dataclass
class StepReport:
    """What the blocks have said in one step.

    Attributes:
        losses: Loss of each block that has learned so far, detached, scaled as it was sent back.
        first: The block that the first of them is of: in a global step only the last block has one.
        halves: For each block with a learned backward message, the two halves of its bound, summed over targets.
        targets: How many targets those sums are over.
    """

    losses: list[Tensor] = field(default_factory=list)
    first: int = 0
    halves: list[Tensor] = field(default_factory=list)
    targets: int = 0

    def add(self, loss: Tensor, halves: Tensor | None, targets: int) -> None:
        """Note what one more block has said of its targets."""
        self.losses.append(loss.detach())
        if halves is not None:
            self.halves.append(halves)
            self.targets = targets

    def check_finite(self, step: int) -> None:
        """Stop before a loss that is not a number reaches a weight.

        Args:
            step: Optimizer step under way, for the message.

        Raises:
            NonFiniteLossError: If the loss of a block is NaN or infinite.
        """
        device = self.losses[-1].device
        finite = torch.stack([loss.float().to(device) for loss in self.losses]).isfinite().tolist()
        if not all(finite):
            index = finite.index(False)
            raise NonFiniteLossError(
                f"The loss of block {self.first + index} is {self.losses[index].item()} at step {step}. No weight "
                "has been touched by it: those of this block are as after its last step, and finite. Look at the "
                "data of this batch, lower the learning rate, or use bf16 instead of fp16; then resume from the "
                "last checkpoint."
            )
