"""The feedback of prototypes: for each class, what its samples look like at the end of the block."""

# Shapes: C classes, D hidden width.

from __future__ import annotations

from torch import Tensor, nn

from hf_blocklocal.errors import TargetError
from hf_blocklocal.feedback.base import FeedbackNetwork
from hf_blocklocal.losses.base import KAPPEL2023
from hf_blocklocal.targets.batch import Targets, Task


class PrototypeFeedback(FeedbackNetwork):
    """One linear map without bias from the one-hot target to the block's channels.

    It learns to say the mean of a class over the samples of the batch; the loss does that. The readout beside it is a
    classifier.
    """

    citation = KAPPEL2023
    loss = "kappel2023"
    needs = "it learns a prototype of each class"
    observed = True

    def __init__(
        self, task: Task, *, latent_dim: int, embedding_width: int | None = None, hidden_width: int | None = None
    ) -> None:
        super().__init__()
        if not self.fits(task) or hidden_width is None:
            raise TargetError(
                f"Prototypes need classes and the width of the block, not {task.target!r} targets and width "
                f"{hidden_width}."
            )
        self.units = task.size
        self.table = nn.Linear(task.size, hidden_width, bias=False)

    @classmethod
    def fits(cls, task: Task) -> bool:
        """Tell whether the targets are classes: a vocabulary would make the map as large as a language-model head."""
        return task.target == "classes"

    def forward(self, targets: Targets) -> Tensor:
        """Return the prototype of every class, (C, D)."""
        return self.table.weight.T
