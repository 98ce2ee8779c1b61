"""Agreement of the forward message with the observed target."""

from __future__ import annotations

from torch import Tensor

from hf_blocklocal.losses.base import KAPPEL2023, LocalLoss, Messages
from hf_blocklocal.targets.batch import Targets


class Agreement(LocalLoss):
    """Minus the log overlap of the block's message with the target itself.

    `L = -log integral alpha(z) beta(z) dz` with beta a point mass at the target: cross-entropy for a categorical
    latent, binary cross-entropy for Bernoulli latents, a quarter of the squared error for Gaussian ones. With a
    learned backward message it would be smallest where both messages are constant, so it is not offered for one.
    """

    citation = KAPPEL2023

    def logits(self, messages: Messages) -> Tensor:
        """Return the natural parameters themselves, (N, C)."""
        return messages.forward_NZ.float()

    def of_logits(self, logits_NC: Tensor, targets: Targets) -> Tensor:
        """Return the loss of each target, (N,)."""
        return self.family.surprise(logits_NC, targets.values, self.label_smoothing)
