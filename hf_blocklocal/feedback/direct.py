"""The direct feedback network: one learned linear map from the target to the block."""

# Shapes: C classes or candidates, Z units of the latent, E embedding width.

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hf_blocklocal.errors import TargetError
from hf_blocklocal.feedback.base import FeedbackNetwork
from hf_blocklocal.losses.base import KAPPEL2023
from hf_blocklocal.targets.batch import Targets, Task


class DirectFeedback(FeedbackNetwork):
    """`b_k = g_k(embed(y))` with a linear `g_k`.

    Of a class, `embed` is the one-hot vector, so the network is a table with a message per class. Of a token, it is
    the token's row in the model's own target embedding, normalised and read-only, so that a block never pays for a
    table over the vocabulary.
    """

    citation = KAPPEL2023
    loss = "contrast"
    needs = "it contrasts a target with all others, which needs a finite set"

    def __init__(
        self, task: Task, *, latent_dim: int, embedding_width: int | None = None, hidden_width: int | None = None
    ) -> None:
        super().__init__()
        if not self.fits(task):
            raise TargetError(
                f"Direct feedback needs a finite set of targets to contrast, not {task.target!r} targets."
            )
        self.units = latent_dim
        self.table: nn.Module
        if task.target == "vocabulary":
            assert embedding_width is not None, "a vocabulary has an embedding"
            self.table = nn.Linear(embedding_width, latent_dim, bias=False)
        else:
            self.table = nn.Embedding(task.size, latent_dim)
            nn.init.normal_(self.table.weight, std=latent_dim**-0.5)

    @classmethod
    def fits(cls, task: Task) -> bool:
        """Tell whether the targets can be counted."""
        return task.target in ("classes", "vocabulary")

    def forward(self, targets: Targets) -> Tensor:
        """Return the message of every class or candidate, (C, Z)."""
        if isinstance(self.table, nn.Embedding):
            return self.table.weight
        assert targets.candidates is not None, "vocabulary targets carry candidates"
        embeddings_CE = targets.candidates.embeddings_CE.to(self.table.weight.dtype)
        return self.table(F.layer_norm(embeddings_CE, embeddings_CE.shape[-1:]))
