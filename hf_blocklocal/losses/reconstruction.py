"""Reconstruction: what a block was given shall still be readable from what it hands on."""

# Shapes: B batch, S sequence, D hidden width.

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hf_blocklocal.targets.batch import Targets, by_position


class Reconstruction(nn.Module):
    """Mean squared error of a linear map that reads the block's input from its output, position by position.

    `weight * mean |linear(norm(output)) - layer_norm(input)|^2` over units and positions without padding. The input is
    normalised, so that the error is 1 where nothing is known of it, and detached, so that it is not made easier to
    read. A block that is taught by a classifier alone drops what its own classifier has no use for and later blocks
    might have: Wang et al. (2021), Revisiting locally supervised learning, arXiv 2101.10832, keep it with a decoder of
    the network's input; here it is that of the block, which needs no decoder as deep as the network.

    Args:
        hidden_width: Width of the block's output.
        entering_width: Width of its input.
        weight: Weight beside the loss of the head.
    """

    citation = "Wang et al. (2021), Revisiting locally supervised learning, arXiv 2101.10832"

    def __init__(self, hidden_width: int, entering_width: int, *, weight: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_width)
        self.linear = nn.Linear(hidden_width, entering_width)
        self.weight = weight

    def forward(self, hidden: Tensor, entering: Tensor, targets: Targets) -> Tensor:
        """Return the term, one number.

        Args:
            hidden: Output of the block, (B, S, D) or (B, D, height, width).
            entering: Its input, with as many positions.
            targets: Targets of the batch, which know its padding.
        """
        given_BSD = by_position(entering.detach()).float()
        guess_BSD = self.linear(self.norm(by_position(hidden).to(self.norm.weight.dtype)))
        return self.weight * targets.mean_square(guess_BSD - F.layer_norm(given_BSD, given_BSD.shape[-1:]))

    def extra_repr(self) -> str:
        """Name the weight."""
        return f"weight={self.weight}"
