"""The feedback of local classifiers: the target itself is the message."""

from __future__ import annotations

from hf_blocklocal.feedback.base import FeedbackNetwork
from hf_blocklocal.targets.batch import Targets, Task


class LabelFeedback(FeedbackNetwork):
    """A point mass at the target, with nothing to learn: the readout must put out the target's own parameters.

    Fits every task: logits of classes or labels, means of regression targets. Over a vocabulary the readout is a
    language-model head of its own, which is not light.
    """

    citation = "Nokland & Eidnes (2019), Training neural networks with local error signals, arXiv 1901.06656"
    loss = "agreement"
    observed = True

    def __init__(
        self, task: Task, *, latent_dim: int, embedding_width: int | None = None, hidden_width: int | None = None
    ) -> None:
        super().__init__()
        self.units = task.size

    @classmethod
    def fits(cls, task: Task) -> bool:
        """Every target is its own message."""
        return True

    def forward(self, targets: Targets) -> None:
        """Return nothing: the loss reads the targets."""
        return
