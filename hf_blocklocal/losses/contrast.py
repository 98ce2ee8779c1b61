"""Contrast of the target's message with the messages of all other targets."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_blocklocal.losses.base import KAPPEL2023, LocalLoss, Messages
from hf_blocklocal.targets.batch import Targets


class Contrast(LocalLoss):
    """Minus the log posterior of the target, given how well each target's message overlaps with the block's.

    `L = -log [Z(a, b(y)) / sum_y' Z(a, b(y'))]` with a uniform prior over targets. A proper conditional likelihood:
    unlike bare agreement it cannot collapse to constant messages. Over a vocabulary, the sum runs over the
    candidates, each weighted by the tokens it stands for.
    """

    citation = KAPPEL2023

    def logits(self, messages: Messages) -> Tensor:
        """Return the log overlap with every candidate's message, (N, C), up to a term per row.

        A head that borrows the model's own language-model head has them already: its rows are the messages.
        """
        if messages.backward_CZ is None:
            return messages.forward_NZ.float()
        return self.family.overlap(messages.forward_NZ, messages.backward_CZ).float()

    @torch.no_grad()
    def halves(self, messages: Messages) -> Tensor | None:
        """Return the halves of the bound, `-log Z(a, b(y))` in full, (2,): of the target's own message alone.

        None where the logits were there already, and no message is known by itself.
        """
        if messages.backward_CZ is None:
            return None
        with torch.autocast(messages.forward_NZ.device.type, enabled=False):
            halves = self.family.halves(messages.forward_NZ, messages.backward_CZ[messages.targets.values])
        return torch.stack([half_N.sum() for half_N in halves])

    def of_logits(self, logits_NC: Tensor, targets: Targets) -> Tensor:
        """Return the loss of each target, (N,)."""
        candidates = targets.candidates
        log_weights_C = logits_NC.new_zeros(()) if candidates is None else candidates.log_weights_C
        size = logits_NC.shape[-1] if candidates is None else candidates.vocabulary
        # A target's own weight is 1. One log-softmax, so that the matrix of scores is saved for backward only once.
        log_p_NC = (logits_NC + log_weights_C).log_softmax(-1)
        loss_N = -log_p_NC.gather(1, targets.values.unsqueeze(1)).squeeze(1)
        if self.label_smoothing == 0:
            return loss_N
        uniform_N = -((log_p_NC - log_weights_C) * log_weights_C.exp()).sum(-1) / size
        return (1 - self.label_smoothing) * loss_N + self.label_smoothing * uniform_N
