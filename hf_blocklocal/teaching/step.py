"""One local training step: the model's own forward, and a loss and a backward pass wherever a block ends.

The last block learns from the model's own loss, which is the caller's to compute and to send back: for it, nothing is
different from ordinary training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_blocklocal.anatomy.answers import Answers, compiles_outside, is_waited_for
from hf_blocklocal.anatomy.modes import outputs_not_recorded
from hf_blocklocal.anatomy.routers import RouterLoss
from hf_blocklocal.borrowing.shortcut import Shortcut
from hf_blocklocal.cut.blocks import Boundaries
from hf_blocklocal.cut.inlets import Inlets
from hf_blocklocal.errors import InputsNeededError
from hf_blocklocal.feedback import FeedbackHead
from hf_blocklocal.losses import Messages
from hf_blocklocal.randomness import stream_per_block
from hf_blocklocal.targets.batch import Targets
from hf_blocklocal.teaching.chunked import ChunkedLoss
from hf_blocklocal.teaching.denoising import Denoising
from hf_blocklocal.teaching.overlap import Interlock
from hf_blocklocal.teaching.report import StepReport


@dataclass(frozen=True)
class _Lesson:
    """What `teach` is given for one micro-batch."""

    targets: Targets | None
    scale: Tensor | float
    inputs: Mapping[str, Any] | None
    custom_loss: Callable[[Tensor], Tensor] | None
    seed: tuple[int, ...]

    @property
    def whole(self) -> Tensor | float:
        """What a term of the batch as a whole is multiplied with: the weight of all its targets."""
        assert self.targets is not None
        return self.targets.elements * self.scale


class LocalStep:
    """Teaches every block but the last while the model's own forward runs.

    Attributes:
        devices: The devices that blocks lie on, where those are several.
        bring: Returns the targets of a micro-batch on the device of a block.
        at_work: The block whose loss is being sent back; None outside of that, as for the last block's.

    Args:
        boundaries: The cut of the model, where the heads stand.
        heads: The feedback head of every block but the last.
        router_loss: Load-balancing loss of a mixture of experts, if the model adds one.
        shortcut: The way to the model's logits, for heads that borrow layers.
        overlap: How many blocks below its own a loss reaches.
        inlets: Notes of what enters the blocks, for losses that look back at it.
        denoising: A term of every block that is sent back by itself, so that the two runs of a block are not kept at
            the same time.
        chunked: Computes the model's own loss, if it is to be computed in chunks.
    """

    def __init__(
        self,
        boundaries: Boundaries,
        heads: Sequence[FeedbackHead],
        *,
        router_loss: RouterLoss | None = None,
        shortcut: Shortcut | None = None,
        overlap: int = 0,
        inlets: Inlets | None = None,
        denoising: Denoising | None = None,
        chunked: ChunkedLoss | None = None,
    ) -> None:
        self.boundaries = boundaries
        self.heads = heads
        self.router_loss = router_loss
        self.shortcut = shortcut
        self.overlap = overlap
        self.inlets = inlets
        self.denoising = denoising
        self.chunked = chunked
        self.devices: tuple[torch.device, ...] = ()
        self.bring: Callable[[int, Targets], Targets] = lambda block, targets: targets
        self.at_work: int | None = None
        self._answers: Answers | None = None

    @contextmanager
    def teach(
        self,
        targets: Targets | None,
        *,
        scale: Tensor | float,
        backward: Callable[..., None] = Tensor.backward,
        learned: Callable[[int, StepReport], None] = lambda block, report: None,
        inputs: Mapping[str, Any] | None = None,
        custom_loss: Callable[[Tensor], Tensor] | None = None,
        heads_only: bool = False,
        bootstrap: float = 0.0,
        seed: tuple[int, ...] | None = None,
    ) -> Iterator[StepReport]:
        """Let each block learn at its end, in the forward pass that runs inside the `with`.

        Send the last block's loss back inside the `with` too: checkpointed layers are recomputed with the hooks on.

        Args:
            targets: Targets of this micro-batch; None with a single block.
            scale: What the sum of the losses of all targets is multiplied with.
            backward: Runs a backward pass from a loss; with overlap, `retain_graph` is passed on.
            learned: Called with a block, and the report so far, when its gradients are complete. Default: nothing.
            inputs: The model's inputs, for heads that borrow layers and for denoising.
            custom_loss: Maps the logits (B, C) that a head predicts to a loss, in place of the head's own.
            heads_only: Whether only the heads learn, and the last block; the losses are reported all the same.
            bootstrap: Weight of the target's message in what blocks hand on; needs learned feedback.
            seed: What dropout and noise are drawn from, for example run, step and micro-batch. Default: torch's
                global stream.

        Yields:
            The report, filled as the forward pass comes by the ends of the blocks.
        """
        report = StepReport(first=self.boundaries.first_taught)
        seed = (int(torch.randint(1 << 31, ())),) if seed is None and targets is not None else seed or ()
        lesson = _Lesson(targets, scale, inputs, custom_loss, seed)
        last = self.boundaries.cut.num_blocks - 1
        interlock = Interlock(0 if heads_only else self.overlap, last)

        def learn(block: int, hidden: Tensor, router_logits: tuple[Tensor, ...]) -> Messages:
            if heads_only:
                hidden, router_logits = hidden.detach(), tuple(logits.detach() for logits in router_logits)
            heard: list[Messages] = []
            mine = replace(lesson, targets=self.bring(block, lesson.targets))
            with self._head_alone(block, heads_only=heads_only):
                loss = self._loss(block, hidden, router_logits, mine, heard.append)
                report.add(loss, self.heads[block].loss.halves(heard[0]), len(mine.targets))
                self._send(backward, block, loss, **({"retain_graph": True} if interlock.overlap > 0 else {}))
            if self.denoising is not None:
                with self._block_again(block, heads_only=heads_only):
                    term = self._denoising(block, hidden, mine)
                    report.losses[-1] = report.losses[-1] + term.detach()
                    self._send(backward, block, term)
            _forget_low_precision(hidden.device)
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

        cut = self.boundaries.attached(leave, late=bootstrap > 0)
        # A stream begins when the block before has learned.
        with self.watched(), cut, self._own_streams(lesson), self._own_loss(), self._remembered(inputs):
            yield report
            send_back(last)

    def _send(self, backward: Callable[..., None], block: int, loss: Tensor, **options: Any) -> None:
        if loss.requires_grad:
            self.at_work = block
            try:
                with torch.autocast(loss.device.type, enabled=False):
                    backward(loss, **options)
            finally:
                self.at_work = None

    @contextmanager
    def _remembered(self, inputs: Mapping[str, Any] | None) -> Iterator[None]:
        """Answer heads that borrow what the model has asked of its inputs, where asking makes the host wait."""
        if self.shortcut is None or self.devices or not is_waited_for(inputs or {}) or not self._can_listen:
            yield
            return
        self._answers = Answers(inputs, self.boundaries.layers, self.boundaries.cut.stacks)
        try:
            with self._answers.attached():
                yield
        finally:
            self._answers = None

    @cached_property
    def _can_listen(self) -> bool:
        return not compiles_outside(self.shortcut.model, self.boundaries.layers)

    def _own_loss(self) -> AbstractContextManager[None]:
        """Let the model compute its own loss in chunks, but not where heads borrow the model."""
        if self.chunked is None:
            return nullcontext()
        return self.chunked.in_place(paused=lambda: self.boundaries.is_suspended)

    def _own_streams(self, lesson: _Lesson) -> AbstractContextManager[None]:
        """Let every block draw from a random stream of its own; a single block draws from the global one."""
        boundaries = self.boundaries
        if lesson.targets is None:
            return nullcontext()
        devices = self.devices or (lesson.targets.values.device,)
        return stream_per_block(boundaries.exits, lesson.seed, devices, paused=lambda: boundaries.is_suspended)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take the notes that terms beside the heads' own losses need."""
        with ExitStack() as stack:
            if self.inlets is not None:
                stack.enter_context(self.inlets.watched())
            if self.denoising is not None:
                stack.enter_context(self.denoising.replay.watched())
            yield

    def seen_by_head(
        self,
        block: int,
        hidden: Tensor,
        inputs: Mapping[str, Any] | None,
        targets: Targets | None,
        *,
        shortened: bool = False,
    ) -> Tensor:
        """Return what a head is given: the block's output, or the logits that borrowed layers make of it.

        Args:
            block: The block.
            hidden: Its output.
            inputs: The model's inputs.
            targets: What is asked of the head; None for all it can tell.
            shortened: Whether to leave out what is not borrowed, even if the head learns with it: to ask what the
                model would predict if it ended there.

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
        answered = nullcontext() if self._answers is None else self._answers.running()
        with self.boundaries.suspended(), answered:
            translated = self.heads[block].translate(hidden)
            return self.shortcut.logits(block, translated, inputs, trail, tokens_C, shortened=shortened)

    def borrowing(self, block: int, *, heads_only: bool = False) -> AbstractContextManager[None]:
        """Lend the head of a block what it borrows from the model, for its forward and its backward pass."""
        return nullcontext() if self.shortcut is None else self.shortcut.lent(block, head_only=heads_only)

    def _loss(
        self,
        block: int,
        hidden: Tensor,
        router_logits: tuple[Tensor, ...],
        lesson: _Lesson,
        hear: Callable[[Messages], None],
    ) -> Tensor:
        """Return the loss of a block's head, its reconstruction included, with what its routers add."""
        head = self.heads[block]
        seen = self.seen_by_head(block, hidden, lesson.inputs, lesson.targets)
        if lesson.custom_loss is None:
            loss = head(seen, lesson.targets, hear).sum() * lesson.scale
        else:
            loss = lesson.custom_loss(head.logits(seen, lesson.targets, hear))
        if head.reconstruction is not None:
            assert self.inlets is not None, "a reconstruction needs notes of what enters a block"
            term = head.reconstruction(hidden, self.inlets[block].hidden, lesson.targets)
            loss = loss + term * lesson.whole
        return loss + self._router_loss(block, router_logits, lesson.targets) if router_logits else loss

    def _denoising(self, block: int, hidden: Tensor, lesson: _Lesson) -> Tensor:
        """Return the term of the block's second run."""
        assert self.denoising is not None
        if lesson.inputs is None:
            raise InputsNeededError(
                "With denoising, blocks run a second time, which needs the inputs of the forward pass. Call "
                "teach(..., inputs=batch), or use BlockLocalConfig(denoising=0)."
            )
        term = self.denoising(block, hidden, lesson.targets, lesson.inputs, lesson.seed)
        return term * lesson.whole

    @contextmanager
    def _head_alone(self, block: int, *, heads_only: bool) -> Iterator[None]:
        """Keep gradients from what a borrowed layer owns, and record no graph where there is nothing to learn."""
        with ExitStack() as stack:
            stack.enter_context(outputs_not_recorded())
            stack.enter_context(self.borrowing(block, heads_only=heads_only))
            if heads_only and not any(parameter.requires_grad for parameter in self.heads[block].parameters()):
                stack.enter_context(torch.no_grad())
            yield

    @contextmanager
    def _block_again(self, block: int, *, heads_only: bool) -> Iterator[None]:
        """Keep gradients from what other blocks own, and record no graph where only heads learn."""
        assert self.denoising is not None
        with ExitStack() as stack:
            stack.enter_context(outputs_not_recorded())
            stack.enter_context(self.denoising.replay.read_only(block))
            if heads_only:
                stack.enter_context(torch.no_grad())
            yield

    def _router_loss(self, block: int, router_logits: tuple[Tensor, ...], targets: Targets) -> Tensor:
        """Return a block's part in the router loss: that of its own layers, in proportion to their number."""
        assert self.router_loss is not None
        cut = self.boundaries.cut
        balance = self.router_loss.balance(router_logits, targets.mask_BS)
        return self.router_loss.coefficient * len(cut.spans[block]) / len(cut.layers) * balance


def _forget_low_precision(device: torch.device) -> None:
    """Free the copies of a block's weights in low precision, which would live until the whole forward ends."""
    if torch.is_autocast_enabled(device.type):
        torch.clear_autocast_cache()
