"""Let the loss of a block teach the blocks right below it too: interlocking backpropagation.

Gomez et al. (2020), Interlocking Backpropagation, arXiv 2010.04116. A block hands on a fresh leaf in place of its
output. What a loss says about that leaf is sent into the output, which was kept, and so on, a number of blocks back.
The graph of a block lives until the last loss that reaches it has been sent back, and no longer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_blocklocal.errors import LossNotSentBackError


CITATION = "Gomez et al. (2020), Interlocking Backpropagation, arXiv 2010.04116"


@dataclass(frozen=True)
class _Kept:
    """The output of a block, and the leaf that stands for it above."""

    output: Tensor
    leaf: Tensor


class Interlock:
    """The outputs of blocks that later losses reach, in one forward pass.

    Args:
        overlap: How many blocks below its own a loss reaches; 0 is none.
        last: The last block.
    """

    def __init__(self, overlap: int, last: int) -> None:
        self.overlap = overlap
        self.last = last
        self._kept: dict[int, _Kept] = {}

    def hand_on(self, block: int, hidden: Tensor) -> Tensor | None:
        """Keep the output of a block and return what stands for it above; nothing without overlap.

        It is a copy, so that the next block may change it in place.
        """
        if self.overlap == 0:
            return None
        leaf = hidden.detach().requires_grad_(hidden.requires_grad)
        self._kept[block] = _Kept(hidden, leaf)
        return leaf.clone()

    def send_back(self, block: int) -> range:
        """Send what the loss of a block has left at its input into the blocks below.

        Args:
            block: The block, whose own backward pass is over.

        Returns:
            Blocks below the last that no later loss reaches, and that had not been told before, in ascending order.

        Raises:
            LossNotSentBackError: If it is the last block and its loss has left nothing.
        """
        lowest = max(0, block - self.overlap)
        gradient = self._take(block - 1)
        if gradient is None and block == self.last and lowest < block and self._kept[block - 1].leaf.requires_grad:
            raise LossNotSentBackError(
                f"The last block's loss was not sent back inside the step, and with overlap={self.overlap} blocks "
                "below learn from it too. Call loss.backward() inside the `with`."
            )
        for lower in range(block - 1, lowest - 1, -1):
            if gradient is None:
                break
            reached_again = block < self.last and block < lower + self.overlap
            with torch.autocast(gradient.device.type, enabled=False):
                torch.autograd.backward(self._kept[lower].output, gradient, retain_graph=reached_again)
            gradient = self._take(lower - 1)
        complete = range(lowest, block) if block == self.last else range(lowest, max(0, block - self.overlap + 1))
        for lower in complete:
            self._kept.pop(lower, None)
        return complete

    def _take(self, block: int) -> Tensor | None:
        """Return the gradient at the leaf of a block that is kept, and forget it there."""
        if block not in self._kept:
            return None
        leaf = self._kept[block].leaf
        gradient, leaf.grad = leaf.grad, None
        return gradient
