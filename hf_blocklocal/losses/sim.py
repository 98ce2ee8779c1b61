"""Similarity matching: samples shall look alike to a block as far as their targets are alike."""

# Shapes: N targets, R targets compared, D hidden width, M labels.

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_blocklocal.targets.batch import Targets


MOST_ROWS = 512
"""Rows of a batch that are compared with each other."""


class SimilarityMatching(nn.Module):
    """Mean squared difference between two matrices of cosines: of rows of the block, and of one-hot targets.

    The rows go through a learned linear map, and each vector is centred over its own units. Of a batch with more than
    `MOST_ROWS` targets, that many are compared, evenly spaced. A row that answers several targets stands for each.
    Nokland & Eidnes (2019), Training neural networks with local error signals, arXiv 1901.06656.

    Args:
        hidden_width: Width D of the block's output.
    """

    citation = "Nokland & Eidnes (2019), Training neural networks with local error signals, arXiv 1901.06656"

    def __init__(self, hidden_width: int) -> None:
        super().__init__()
        self.map = nn.Linear(hidden_width, hidden_width, bias=False)

    def forward(self, rows_ND: Tensor, targets: Targets) -> Tensor:
        """Return one number for the batch: 0 where the matrices are equal, at most 4."""
        rows_RD, seen = evenly(rows_ND, targets)
        directions_RD = centred_directions(self.map(rows_RD.to(self.map.weight.dtype)))
        return F.mse_loss((directions_RD @ directions_RD.T).float(), target_similarity(seen))


def evenly(rows_ND: Tensor, targets: Targets, most: int = MOST_ROWS) -> tuple[Tensor, Targets]:
    """Return rows and targets, or `most` of them, evenly spaced, if there are more."""
    count = len(targets)
    if count <= most:
        return rows_ND, targets
    index_R = torch.arange(most, device=rows_ND.device) * count // most
    return rows_ND[index_R], replace(targets, values=targets.values[index_R])


def centred_directions(rows_RD: Tensor) -> Tensor:
    """Return rows of length 1, each centred over its units before; a row of equal units becomes 0."""
    rows_RD = rows_RD.float()
    return F.normalize(rows_RD - rows_RD.mean(1, keepdim=True), dim=1)


def target_similarity(targets: Targets) -> Tensor:
    """Return the cosines (R, R) between the targets, written as centred one-hot, or several-hot, vectors."""
    if targets.task.target == "multi_label":
        directions_RM = centred_directions(targets.values)
        return directions_RM @ directions_RM.T
    same_RR = targets.values.unsqueeze(1) == targets.values
    # Two different one-hot vectors of C units, once centred, meet at this cosine: no need to write them down.
    return torch.where(same_RR, 1.0, -1 / (targets.task.size - 1))
