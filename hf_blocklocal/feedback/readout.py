"""From the hidden state of a block to the natural parameters of its forward message."""

# Shapes: R rows, D hidden width, Z units of the latent.

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class LinearReadout(nn.Module):
    """A layer norm, because the scale of hidden states drifts with depth, and one linear map.

    Args:
        hidden_width: Width D of the block's output.
        units: Units Z of the latent.
    """

    def __init__(self, hidden_width: int, units: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_width)
        self.linear = nn.Linear(hidden_width, units)

    def forward(self, rows_RD: Tensor) -> Tensor:
        """Return natural parameters, (R, Z)."""
        return self.linear(self.norm(rows_RD.to(self.norm.weight.dtype)))


class MLPReadout(LinearReadout):
    """The same with one hidden layer of the block's own width between the norm and the last map.

    The block may leave to it what a linear map cannot undo: Belilovsky et al. (2020), Decoupled greedy learning of
    CNNs, arXiv 1901.08164, teach blocks through auxiliary networks that are deeper than linear.

    Args:
        hidden_width: Width D of the block's output.
        units: Units Z of the latent.
    """

    def __init__(self, hidden_width: int, units: int) -> None:
        super().__init__(hidden_width, units)
        self.hidden = nn.Linear(hidden_width, hidden_width)

    def forward(self, rows_RD: Tensor) -> Tensor:
        """Return natural parameters, (R, Z)."""
        return self.linear(F.gelu(self.hidden(self.norm(rows_RD.to(self.norm.weight.dtype)))))


READOUTS: dict[str, type[LinearReadout]] = {"linear": LinearReadout, "mlp": MLPReadout}
