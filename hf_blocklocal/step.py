"""One local training step: the model's own forward, and a loss and a backward pass wherever a block ends.

The last block learns from the model's own loss, which is the caller's to compute and to send back: for it, nothing is
different from ordinary training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_blocklocal.anatomy import RouterLoss, outputs_not_recorded
from hf_blocklocal.blocks import Boundaries
from hf_blocklocal.errors import InputsNeededError, NonFiniteLossError
from hf_blocklocal.feedback import FeedbackHead
from hf_blocklocal.losses import Messages
from hf_blocklocal.overlap import Interlock
from hf_blocklocal.shortcut import Shortcut
from hf_blocklocal.targets import Targets


@dataclass
class StepReport:
    """What the blocks have said in one step.

    Attributes:
        losses: Loss of each block that has learned so far, detached, scaled as it was sent back.
        first: The block that the first of them is of: in a global step only the last block has one.
        halves: For each block with a learned backward message, the two halves of its bound, summed over targets.
        targets: How many targets those sums are over.
    """

    losses: list[Tensor] = field(default_factory=list)
    first: int = 0
    halves: list[Tensor] = field(default_factory=list)
    targets: int = 0

    def add(self, loss: Tensor, halves: Tensor | None, targets: int) -> None:
        """Note what one more block has said of its targets."""
        self.losses.append(loss.detach())
        if halves is not None:
            self.halves.append(halves)
            self.targets = targets

    def check_finite(self, step: int) -> None:
        """Stop before a loss that is not a number reaches a weight.

        Args:
            step: Optimizer step under way, for the message.

        Raises:
            NonFiniteLossError: If the loss of a block is NaN or infinite.
        """
        device = self.losses[-1].device
        finite = torch.stack([loss.float().to(device) for loss in self.losses]).isfinite().tolist()
        if not all(finite):
            index = finite.index(False)
            raise NonFiniteLossError(
                f"The loss of block {self.first + index} is {self.losses[index].item()} at step {step}. No weight "
                "has been touched by it: those of this block are as after its last step, and finite. Look at the "
                "data of this batch, lower the learning rate, or use bf16 instead of fp16; then resume from the "
                "last checkpoint."
            )


class LocalStep:
    """Teaches every block but the last while the model's own forward runs.

    Args:
        boundaries: The cut of the model, where the heads stand.
        heads: The feedback head of every block but the last.
        router_loss: Load-balancing loss of a mixture of experts, if the model adds one.
        shortcut: The way to the model's logits, for heads that borrow layers.
        overlap: How many blocks below its own a loss reaches.
    """

    def __init__(
        self,
        boundaries: Boundaries,
        heads: Sequence[FeedbackHead],
        *,
        router_loss: RouterLoss | None = None,
        shortcut: Shortcut | None = None,
        overlap: int = 0,
    ) -> None:
        self.boundaries = boundaries
        self.heads = heads
        self.router_loss = router_loss
        self.shortcut = shortcut
        self.overlap = overlap

    @contextmanager
    def teach(
        self,
        targets: Targets | None,
        *,
        scale: Tensor | float,
        backward: Callable[..., None],
        learned: Callable[[int, StepReport], None],
        inputs: Mapping[str, Any] | None = None,
        custom_loss: Callable[[Tensor], Tensor] | None = None,
        heads_only: bool = False,
        bootstrap: float = 0.0,
    ) -> Iterator[StepReport]:
        """Let each block learn at its end, in the forward pass that runs inside the `with`.

        Send the last block's loss back inside the `with` too: checkpointed layers are recomputed with the hooks on.

        Args:
            targets: Targets of this micro-batch; None with a single block.
            scale: What the sum of the losses of all targets is multiplied with.
            backward: Runs a backward pass from a loss; with overlap, `retain_graph` is passed on.
            learned: Called with a block, and the report so far, when its gradients are complete.
            inputs: The model's inputs, for heads that borrow layers.
            custom_loss: Maps the logits (B, C) that a head predicts to a loss, in place of the head's own.
            heads_only: Whether only the heads learn, and the last block; the losses are reported all the same.
            bootstrap: Weight of the target's message in what blocks hand on; needs learned feedback.

        Yields:
            The report, filled as the forward pass comes by the ends of the blocks.
        """
        report = StepReport()

        last = self.boundaries.cut.num_blocks - 1
        interlock = Interlock(0 if heads_only else self.overlap, last)

        def learn(block: int, hidden: Tensor, router_logits: tuple[Tensor, ...]) -> Messages:
            head = self.heads[block]
            if heads_only:
                hidden, router_logits = hidden.detach(), tuple(logits.detach() for logits in router_logits)
            with (
                outputs_not_recorded(),
                self.borrowing(block, heads_only=heads_only),
                _recording(head if heads_only else None),
            ):
                seen = self.seen_by_head(block, hidden, inputs, targets)
                heard: list[Messages] = []
                if custom_loss is None:
                    loss = head(seen, targets, heard.append).sum() * scale
                else:
                    loss = custom_loss(head.logits(seen, targets, heard.append))
                loss = loss + self._router_loss(block, router_logits, targets) if router_logits else loss
                report.add(loss, head.loss.halves(heard[0]), len(targets))
                if loss.requires_grad:
                    with torch.autocast(hidden.device.type, enabled=False):
                        backward(loss, **({"retain_graph": True} if interlock.overlap > 0 else {}))
            if torch.is_autocast_enabled(hidden.device.type):
                # The copies of this block's weights in low precision would live until the whole forward ends.
                torch.clear_autocast_cache()
            return heard[0]

        def send_back(block: int) -> None:
            with outputs_not_recorded():
                complete = interlock.send_back(block)
            for lower in complete:
                learned(lower, report)

        def leave(block: int, hidden: Tensor, router_logits: tuple[Tensor, ...]) -> Tensor | None:
            messages = learn(block, hidden, router_logits)
            if bootstrap > 0:  # before the head is stepped
                handed_on = self.heads[block].bootstrapped(hidden.detach(), messages, bootstrap)
            else:
                handed_on = interlock.hand_on(block, hidden)
            send_back(block)
            return handed_on

        with self.boundaries.attached(leave):
            yield report
            send_back(last)

    def seen_by_head(
        self, block: int, hidden: Tensor, inputs: Mapping[str, Any] | None, targets: Targets | None
    ) -> Tensor:
        """Return what a head is given: the block's output, or the logits that borrowed layers make of it.

        Raises:
            InputsNeededError: If layers are borrowed and the inputs are missing.
        """
        if self.shortcut is None:
            return hidden
        if inputs is None:
            raise InputsNeededError(
                "The heads borrow layers of the model (head_layers), which need the inputs of the forward pass. Call "
                "teach(..., inputs=batch), or use heads of their own: BlockLocalConfig(head_layers=0)."
            )
        trail = self.boundaries.trail if hidden.requires_grad else self.boundaries.trail.detached()
        tokens_C = None if targets is None or targets.candidates is None else targets.candidates.ids_C
        with self.boundaries.suspended():
            return self.shortcut.logits(block, self.heads[block].translate(hidden), inputs, trail, tokens_C)

    def borrowing(self, block: int, *, heads_only: bool = False) -> AbstractContextManager[None]:
        """Lend the head of a block what it borrows from the model, for its forward and its backward pass."""
        return nullcontext() if self.shortcut is None else self.shortcut.lent(block, head_only=heads_only)

    def _router_loss(self, block: int, router_logits: tuple[Tensor, ...], targets: Targets) -> Tensor:
        """Return a block's part in the router loss: that of its own layers, in proportion to their number."""
        assert self.router_loss is not None
        cut = self.boundaries.cut
        balance = self.router_loss.balance(router_logits, targets.mask_BS)
        return self.router_loss.coefficient * len(cut.spans[block]) / len(cut.layers) * balance


def _recording(head: FeedbackHead | None) -> AbstractContextManager[None]:
    """Record no graph for a head that has nothing to learn, where it alone is to be taught."""
    idle = head is not None and not any(parameter.requires_grad for parameter in head.parameters())
    return torch.no_grad() if idle else nullcontext()
