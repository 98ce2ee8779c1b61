"""The contract of a feedback network: targets in, backward messages out, never an activation."""

# Shapes: C classes or candidates, Z units of the latent.

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from hf_blocklocal.targets.batch import Targets, Task


class FeedbackNetwork(nn.Module, ABC):
    """Carries the target to a block. One subclass, one file, one line in the registry, one test.

    Args:
        task: What is to be predicted.
        latent_dim: Units of the latent that the caller would like.
        embedding_width: Width of the model's own target embedding, None for tasks without a vocabulary.
        hidden_width: Width of the block's output.
    """

    loss: ClassVar[str]
    """Name of the local loss that its messages are made for."""

    citation: ClassVar[str]
    """The paper that it comes from."""

    needs: ClassVar[str] = "it fits every task"
    """What it needs of a task that it does not fit."""

    observed: ClassVar[bool] = False
    """Whether a readout has to predict the target itself, and not a latent."""

    units: int
    """Units of what a readout has to put out: the latent, or the target."""

    @classmethod
    @abstractmethod
    def fits(cls, task: Task) -> bool:
        """Tell whether targets of that task can be carried."""

    @abstractmethod
    def forward(self, targets: Targets) -> Tensor | None:
        """Return the message of every possible target, (C, Z); None if the message is the target itself."""
