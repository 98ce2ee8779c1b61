"""A feedback head: what stands at the end of a block and turns its output and the target into a loss."""

# Shapes: B batch, S sequence, D hidden width, N targets, C classes or candidates, Z units of the latent.

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_blocklocal.borrowing.loans import Loan
from hf_blocklocal.feedback.base import FeedbackNetwork
from hf_blocklocal.feedback.lens import Lens
from hf_blocklocal.losses import LocalLoss, Messages, Reconstruction, SimilarityMatching
from hf_blocklocal.losses.margin import satisfied
from hf_blocklocal.targets.batch import Alignment, Pooling, Targets


class FeedbackHead(nn.Module):
    """Readout of the block, feedback network from the target, and the loss where the two messages meet.

    Attributes:
        loan: Copies of borrowed layers that the head trains as its own; None where it trains none.

    Args:
        readout: Maps rows of the hidden state (R, D) to natural parameters (R, Z).
        feedback: Maps targets to natural parameters.
        loss: Compares the two.
        alignment: Whether each target has its own position in the hidden state.
        pooling: How a sample's hidden states are pooled where it has not.
        borrows: Whether it is given logits that borrowed layers of the model have made of the block's output, in
            place of that output.
        lens: Translates the block's output for those layers; None hands it on as it is.
        satisfied_at: Probability of a target from which on it teaches no longer; None is never.
        similarity: Matches the batch's similarities beside the loss.
        sim: Weight of that, and 1 minus that of the loss. At 1 the loss teaches its own readout, and not the block.
        reconstruction: Reads the block's input from its output. A term beside `forward`, for whoever knows the input.
    """

    def __init__(
        self,
        readout: nn.Module,
        feedback: FeedbackNetwork,
        loss: LocalLoss,
        *,
        alignment: Alignment,
        pooling: Pooling,
        borrows: bool = False,
        lens: Lens | None = None,
        satisfied_at: float | None = None,
        similarity: SimilarityMatching | None = None,
        sim: float = 0.0,
        reconstruction: Reconstruction | None = None,
    ) -> None:
        super().__init__()
        self.readout = readout
        self.feedback = feedback
        self.loss = loss
        self.alignment = alignment
        self.pooling = pooling
        self.borrows = borrows
        self.lens = lens
        self.satisfied_at = satisfied_at
        self.similarity = similarity
        self.sim = sim
        self.reconstruction = reconstruction
        self.loan: Loan | None = None

    def translate(self, hidden: Tensor) -> Tensor:
        """Return what borrowed layers are to be given in place of the block's output."""
        return hidden if self.lens is None else self.lens(hidden)

    def messages(self, hidden: Tensor, targets: Targets) -> Messages:
        """Compute both messages.

        Args:
            hidden: Output of the block, (B, S, D).
            targets: Targets of the batch.
        """
        rows_RD, index_N = targets.rows(hidden, self.alignment, self.pooling)
        forward = self.readout(rows_RD)
        rows_ND = None
        if self.loss.needs_rows:
            rows_ND = rows_RD if index_N is None else rows_RD[index_N]
        answers = targets.answers(forward, index_N, as_model=self.borrows)
        return Messages(answers, self.feedback(targets), targets, rows_ND)

    def forward(self, hidden: Tensor, targets: Targets, heard: Callable[[Messages], None] | None = None) -> Tensor:
        """Return the loss of each target, (N,), in nats; 0 without gradient where the target is satisfied.

        Similarities are of the batch as a whole: each target has an equal share in them, such that the sum over
        targets, divided by the number of elements as the caller does, is the term itself.

        Args:
            hidden: Output of the block, (B, S, D).
            targets: Targets of the batch.
            heard: Called with the messages, so that nobody who wants them computes them a second time.
        """
        if self.similarity is None:
            return self._loss_N(hidden, targets, heard)
        rows_RD, index_N = targets.rows(hidden, self.alignment, self.pooling)
        term = self.similarity(rows_RD if index_N is None else rows_RD[index_N], targets)
        share = self.sim * term * targets.values.shape[1:].numel()
        if self.sim == 1:
            return self._loss_N(hidden.detach(), targets, heard) + share
        return (1 - self.sim) * self._loss_N(hidden, targets, heard) + share

    def _loss_N(  # noqa: N802
        self, hidden: Tensor, targets: Targets, heard: Callable[[Messages], None] | None
    ) -> Tensor:
        messages = self.messages(hidden, targets)
        if heard is not None:
            heard(messages)
        if self.satisfied_at is None:
            return self.loss(messages)
        logits_NC = self.loss.logits(messages)
        return self.loss.of_logits(logits_NC, targets).masked_fill(
            satisfied(logits_NC, targets, self.satisfied_at), 0.0
        )

    @torch.no_grad()
    def bootstrapped(self, hidden: Tensor, messages: Messages, weight: float) -> Tensor:
        """Move a hidden state to where the readout says the posterior in place of the forward message.

        That is `alpha beta^weight`, beta being the message of the target. The head needs a learned feedback network
        and a linear readout.

        Args:
            hidden: Output of the block, (B, S, D).
            messages: What the head has made of it.
            weight: Weight of the backward message, lambda.

        Returns:
            What is handed on in place of the hidden state, without gradient.
        """
        targets = messages.targets
        rows_RD, index_N = targets.rows(hidden, self.alignment, self.pooling)
        a_NZ, b_NZ = messages.forward_NZ, messages.backward_CZ[targets.values]
        change_NZ = self.loss.family.posterior(a_NZ, b_NZ, weight) - a_NZ
        change_ND = self.readout.carry_back(rows_RD if index_N is None else rows_RD[index_N], change_NZ)
        return targets.moved(hidden, change_ND, self.alignment)

    def logits(self, hidden: Tensor, targets: Targets, heard: Callable[[Messages], None] | None = None) -> Tensor:
        """Return what the block would predict for each target, (N, C); `heard` as in `forward`."""
        messages = self.messages(hidden, targets)
        if heard is not None:
            heard(messages)
        return self.loss.logits(messages)

    def extra_repr(self) -> str:
        """Name what the readout looks at."""
        return self.alignment if self.alignment == "position" else f"pooled by {self.pooling}"
