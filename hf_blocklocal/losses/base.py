"""The contract of a local loss: two messages in, one number per target out."""

# Shapes: N targets, C classes or candidates, Z units of the latent.

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from hf_blocklocal.losses.families import Family
from hf_blocklocal.targets.batch import Targets


KAPPEL2023 = "Kappel et al. (2023), Block-local learning with probabilistic latent representations, arXiv 2305.14974"
"""The paper of the method."""


@dataclass(frozen=True)
class Messages:
    """What meets at the end of a block.

    Attributes:
        forward_NZ: Natural parameters a of the forward message, read from the block for every target.
        backward_CZ: Natural parameters b of the backward message of every possible target; None where the message is
            the observed target itself.
        targets: The targets.
        rows_ND: What the readout has looked at, for every target; None unless the loss needs them.
    """

    forward_NZ: Tensor
    backward_CZ: Tensor | None
    targets: Targets
    rows_ND: Tensor | None = None


class LocalLoss(nn.Module, ABC):
    """A loss that a block learns from. One subclass, one file, one line in the registry, one test.

    Args:
        family: The family of the messages.
        label_smoothing: Weight of the uniform distribution mixed into class targets, 0 to 1.
    """

    citation: ClassVar[str]
    needs_rows: ClassVar[bool] = False
    """Whether it looks at the rows of the block too."""

    def __init__(self, family: Family, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.family = family
        self.label_smoothing = label_smoothing

    def forward(self, messages: Messages) -> Tensor:
        """Return the loss of each target, (N,), in nats."""
        return self.of_logits(self.logits(messages), messages.targets)

    def halves(self, messages: Messages) -> Tensor | None:
        """Return `KL(rho || alpha)` and `E_rho[-log beta]`, each summed over targets, (2,), without gradient.

        None where no backward message is learned: of a target that is observed, rho is the point mass there, so the
        halves are the loss itself and 0.
        """
        return None

    @abstractmethod
    def logits(self, messages: Messages) -> Tensor:
        """Return what the block would predict, (N, C): in the form of the model's own logits."""

    @abstractmethod
    def of_logits(self, logits_NC: Tensor, targets: Targets) -> Tensor:
        """Return the loss of each target, (N,), given what the block would predict."""

    def extra_repr(self) -> str:
        """Name the family, and the smoothing if there is any."""
        smoothing = f", label_smoothing={self.label_smoothing}" if self.label_smoothing else ""
        return f"family={self.family.name}{smoothing}"
