"""From the hidden state of a block to the natural parameters of its forward message."""

# Shapes: R rows, D hidden width, Z units of the latent.

from __future__ import annotations

import torch
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

    @torch.no_grad()
    def carry_back(self, rows_RD: Tensor, change_RZ: Tensor) -> Tensor:
        """Return the smallest change of rows that changes what is read by a given amount, (R, D).

        Smallest in the space of normalised rows, where the layer norm is taken to shift and scale each row as it does
        now; what it does to the changed row may differ. Of what no row can say, the nearest that one can.

        Args:
            rows_RD: Rows as they are.
            change_RZ: Wanted change of the natural parameters.
        """
        with torch.autocast(rows_RD.device.type, enabled=False):
            map_ZD = self.linear.weight.float() * self.norm.weight.float()
            map_ZD = map_ZD - map_ZD.mean(1, keepdim=True)  # a layer norm is blind to a shift of all units
            # The pseudo-inverse by way of the small Gram matrix: the latent is narrower than the block.
            change_RD = change_RZ.float() @ torch.linalg.pinv(map_ZD @ map_ZD.T, hermitian=True) @ map_ZD
            variance_R1 = rows_RD.float().var(1, unbiased=False, keepdim=True)
            return change_RD * (variance_R1 + self.norm.eps).sqrt()


class MLPReadout(LinearReadout):
    """The same with one hidden layer of the block's own width between the norm and the last map.

    The block may leave to it what a linear map cannot undo: Belilovsky et al. (2020), Decoupled greedy learning of
    CNNs, arXiv 1901.08164, teach blocks through auxiliary networks that are deeper than linear.

    Args:
        hidden_width: Width D of the block's output.
        units: Units Z of the latent.
    """

    citation = "Belilovsky et al. (2020), Decoupled greedy learning of CNNs, arXiv 1901.08164"

    def __init__(self, hidden_width: int, units: int) -> None:
        super().__init__(hidden_width, units)
        self.hidden = nn.Linear(hidden_width, hidden_width)

    def forward(self, rows_RD: Tensor) -> Tensor:
        """Return natural parameters, (R, Z)."""
        return self.linear(F.gelu(self.hidden(self.norm(rows_RD.to(self.norm.weight.dtype)))))


READOUTS: dict[str, type[LinearReadout]] = {"linear": LinearReadout, "mlp": MLPReadout}
