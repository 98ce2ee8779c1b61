"""The chained feedback network: the message of the block above, carried one block down by a learned linear map."""

# Shapes: C classes or candidates, Z units of the latent.

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hf_blocklocal.feedback.base import FeedbackNetwork
from hf_blocklocal.feedback.direct import DirectFeedback
from hf_blocklocal.targets.batch import Targets, Task


class ChainedFeedback(FeedbackNetwork):
    """`b_k = g_k(b_{k+1})`: a layer norm of the message from above, and one linear map.

    The chain starts at the target, `b_K = embed(y)`, so the network of the uppermost block with a head is a
    `DirectFeedback`. The message from above is detached: a block's loss teaches its own map and no other. Within a
    step it is as it was at the beginning, because a block learns, and is stepped, before the one above it.

    The network above is heard, not owned: its parameters are counted, trained and saved with its own block.

    Args:
        task: What is to be predicted.
        latent_dim: Units of the latent.
        above: The feedback network of the block above.
    """

    citation = DirectFeedback.citation
    loss = DirectFeedback.loss
    needs = DirectFeedback.needs

    def __init__(self, task: Task, *, latent_dim: int, above: FeedbackNetwork) -> None:
        super().__init__()
        self.units = latent_dim
        self.map = nn.Linear(above.units, latent_dim, bias=False)
        # Messages of about length 1, as those of classes have at the start of the chain.
        nn.init.normal_(self.map.weight, std=(above.units * latent_dim) ** -0.5)
        self._above = (above,)  # in a tuple, or it would be registered as a part of this network

    @classmethod
    def fits(cls, task: Task) -> bool:
        """Tell whether the targets can be counted."""
        return DirectFeedback.fits(task)

    @property
    def above(self) -> FeedbackNetwork:
        """The feedback network of the block above."""
        return self._above[0]

    def forward(self, targets: Targets) -> Tensor:
        """Return the message of every class or candidate, (C, Z)."""
        # Not under no_grad, where autocast would keep copies of weights without gradient.
        message_CZ = self.above(targets).detach()
        return self.map(F.layer_norm(message_CZ, message_CZ.shape[-1:]))
