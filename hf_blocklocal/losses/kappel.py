"""The loss that the public experiments of block-local learning train a block with, but for denoising."""

# Shapes: N targets, R targets compared, C classes, D hidden width.

from __future__ import annotations

import torch
from torch import Tensor

from hf_blocklocal.losses.agreement import Agreement
from hf_blocklocal.losses.base import Messages
from hf_blocklocal.losses.sim import centred_directions, evenly
from hf_blocklocal.targets.batch import occurrences


PREDICTION = 0.5
DECORRELATION = 0.7
PROTOTYPE = 0.25
REGRESSION = 0.5


class Kappel2023(Agreement):
    """Prediction, decorrelation of the samples, and an inner product with the prototype of the target.

    With x the rows of the block, centred over their units and of length 1, and b the prototype of a sample's class:

        0.5 CE + 0.7 mean over pairs of <x_n, x_m>^2 - 0.25 mean <b, x> + 0.5 mean over classes and units of (b - m)^2

    where CE is the cross-entropy of the readout and m the mean of x over the samples of a class. Prototypes teach
    the block but not the block them: the third term leaves b alone, and the fourth, over the classes that occur in the
    batch, is all that b learns from.

    Against the public code: its inner product enters with the opposite sign, which pushes samples away from their own
    prototype, and is divided by the number of samples once more, which makes it vanish; it learns prototypes in an
    optimizer of their own; it pools by the maximum, and here the head pools as it is told to. Its squared distance to
    the activation for a noisy input is not of the head but of the block: the field `denoising`, which the preset sets
    to 1. Pairs are those of at most 512 targets, evenly spaced.
    """

    needs_rows = True

    def forward(self, messages: Messages) -> Tensor:
        """Return the loss of each target, (N,): its own prediction, and all other terms, which are of the batch."""
        assert messages.rows_ND is not None, "a loss of prototypes needs the rows of the block"
        assert messages.backward_CZ is not None, "a loss of prototypes needs the prototype of every class"
        x_ND, prototypes_CD = centred_directions(messages.rows_ND), messages.backward_CZ.float()
        targets = messages.targets
        inner = (x_ND * prototypes_CD.detach()[targets.values]).sum(1).sum() / max(len(targets), 1)
        terms = (
            DECORRELATION * _decorrelation(evenly(x_ND, targets)[0])
            - PROTOTYPE * inner
            + REGRESSION * _distance_to_means(prototypes_CD, x_ND.detach(), targets.values)
        )
        return PREDICTION * super().forward(messages) + terms


def _decorrelation(x_RD: Tensor) -> Tensor:
    """Return the mean squared cosine between different rows, 0 if there is but one."""
    cosines_RR = (x_RD @ x_RD.T).float()
    others_RR = ~torch.eye(len(x_RD), dtype=torch.bool, device=x_RD.device)
    return (cosines_RR.square() * others_RR).sum() / max(len(x_RD) * (len(x_RD) - 1), 1)


def _distance_to_means(prototypes_CD: Tensor, x_ND: Tensor, classes_N: Tensor) -> Tensor:
    """Return the mean squared difference between prototypes and means of the classes that occur."""
    sums_CD = torch.zeros_like(prototypes_CD).index_add(0, classes_N, x_ND)
    counts_C1 = occurrences(classes_N, len(prototypes_CD)).unsqueeze(1)
    squares_CD = (prototypes_CD - sums_CD / counts_C1.clamp(min=1)).square() * (counts_C1 > 0)
    return squares_CD.sum() / ((counts_C1 > 0).sum() * prototypes_CD.shape[1]).clamp(min=1)
