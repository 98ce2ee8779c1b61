"""A model that is ready to be trained block by block, and all that a training loop of one's own asks of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_blocklocal.anatomy.embeddings import target_embedding
from hf_blocklocal.borrowing.copies import Copies
from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.cut.blocks import Cut
from hf_blocklocal.cut.needs import Needs
from hf_blocklocal.errors import TargetError, UnsupportedSettingError
from hf_blocklocal.optim.groups import factors_by_block, rates_of_feedback, scale_learning_rates_
from hf_blocklocal.targets.batch import Targets, Task
from hf_blocklocal.teaching.describing import table_of_blocks
from hf_blocklocal.teaching.loss_scale import loss_scale
from hf_blocklocal.teaching.reading import contrasts_tokens, targets_for
from hf_blocklocal.teaching.report import StepReport
from hf_blocklocal.teaching.step import LocalStep
from hf_blocklocal.teaching.taught_model import TaughtModel, name_of_original


@dataclass(frozen=True)
class Assembly:
    """A model ready to be trained block by block.

    Attributes:
        config: How it is cut and taught, with nothing left open.
        task: What it is to predict; None with a single block, which asks for nothing but the model's own loss.
        cut: Where it is cut.
        module: The model with its heads.
        parameters: The parameters of each block and its head, in the model's order.
        step: Runs one local training step.
        counts_items: Whether the model's own loss heeds `num_items_in_batch`.
        forms: For each layer, 0 if it returns its hidden state, n if it returns a tuple of n that starts with it.
        owners: The block that owns each parameter of the model, by name.
        lent: For each block but the last, the names of the parameters of later blocks that its head uses.
        copies: Copies of those, if the config asks for any; else heads use live ones.
        needs: What each block needs to be run by itself, if blocks are apart or heads borrow.
        head_costs: Operations of each head as a share of those of its block, forward and backward, in the traced
            batch; none where that has no target that counts.
        parts: For each parameter of the model that is spread over several processes, what is here of it, which is in
            `parameters` in its place.
        shared: The names of the parameters that the losses of several blocks reach.
        chooses_rates: Whether a user has said at which rates blocks learn.
        fingerprint: What tells whether the model has been changed since.
    """

    config: BlockLocalConfig
    task: Task | None
    cut: Cut
    module: TaughtModel
    parameters: tuple[tuple[nn.Parameter, ...], ...]
    step: LocalStep
    counts_items: bool
    forms: tuple[int, ...] = ()
    owners: Mapping[str, int] = field(default_factory=dict)
    lent: tuple[set[str], ...] = ()
    copies: Copies | None = None
    needs: Needs | None = None
    head_costs: tuple[float, ...] = ()
    parts: Mapping[nn.Parameter, nn.Parameter] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    chooses_rates: bool = False
    fingerprint: tuple[Any, ...] = ()

    @property
    def heads(self) -> nn.ModuleList:
        """The feedback head of every block but the last."""
        return self.module.heads

    @property
    def last(self) -> int:
        """The last block, which learns from the model's own loss."""
        return self.cut.num_blocks - 1

    @property
    def originals(self) -> dict[nn.Parameter, nn.Parameter]:
        """For each copy that a head trains, the weight of the model that it is a copy of."""
        named = dict(self.module.named_parameters())
        pairs = ((parameter, named[name_of_original(name)]) for name, parameter in named.items())
        return {copy: original for copy, original in pairs if copy is not original}

    def still_fits(self) -> bool:
        """Tell whether the model has the parameters that it had when it was cut, in their shapes.

        Heads that train copies train those of weights that learn, so there these have to be the same too.
        """
        return self.fingerprint == fingerprint_of(self.module.model, trained=self.config.head_copies == "trained")

    @property
    def couples(self) -> bool:
        """Whether gradients of a block come from other losses than its own too."""
        config = self.config
        global_steps = config.global_every is not None or config.polish > 0
        return config.overlap > 0 or global_steps or bool(self.shared)  # what is frozen may be unfrozen

    def read_targets(
        self, inputs: Mapping[str, Any], *, seed: tuple[int, ...] = (0,), whole_vocabulary: bool = False
    ) -> Targets | None:
        """Read what a batch is to be taught; nothing with a single block.

        Args:
            inputs: The model's inputs with labels.
            seed: What the negatives of a vocabulary are drawn from, for example run, step and micro-batch.
            whole_vocabulary: Whether to contrast with all tokens, as an evaluation does.
        """
        if self.task is None:
            return None
        embedding, negatives = None, None
        if contrasts_tokens(self.task, self.heads):
            embedding, shortcut = target_embedding(self.module.model), self.step.shortcut
            whole_vocabulary = whole_vocabulary or (shortcut is not None and not shortcut.confines)
            negatives = None if whole_vocabulary else self.config.negatives
            embedding = embedding if self.copies is None else self.copies[embedding]
        return targets_for(self.task, inputs, embedding, negatives=negatives, seed=seed)

    def lower_weights(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters of the model that are here and belong to a block below the last, by name."""
        lower = {parameter for block in self.parameters[: self.last] for parameter in block}
        named = ((name, self.parts.get(whole, whole)) for name, whole in self.module.model.named_parameters())
        here = ((name, parameter) for name, parameter in named if parameter in lower and not parameter.is_meta)
        return {name: parameter for name, parameter in here if parameter.requires_grad}

    def begin_step(self, step: int) -> None:
        """Take the copies that are due before an optimizer step. Calls after the first for a step do nothing.

        Args:
            step: Optimizer steps taken so far.
        """
        if self.copies is not None:
            self.copies.advance_(step)

    def check_last_block_learns(self) -> None:
        """Refuse to train where the model's own loss has nothing to teach.

        Raises:
            UnsupportedSettingError: If no parameter of the last block of several is trainable.
        """
        if self.last > 0 and not any(parameter.requires_grad for parameter in self.parameters[self.last]):
            span = self.cut.spans[self.last]
            raise UnsupportedSettingError(
                f"Block {self.last} (layers {span.start} to {span.last} and the task head) has no trainable "
                "parameter, so the model's own loss teaches nothing, and it cannot reach the layers below. "
                "Unfreeze the task head or a layer there, or use num_blocks=1."
            )

    @contextmanager
    def teach(
        self, inputs: Mapping[str, Any], *, step: int, seed: int = 0, accumulation_steps: int = 1, **options: Any
    ) -> Iterator[StepReport]:
        """Let each block but the last learn in the forward pass of a batch that runs inside the `with`.

        All that a loop of one's own needs: the model is run and its own loss sent back inside. Losses are means over
        the targets of the batch.

        Args:
            inputs: The model's inputs with labels.
            step: Optimizer steps taken so far: copies that are due are taken.
            seed: What the negatives of a vocabulary are drawn from, together with the step: another one for each batch
                of a step.
            accumulation_steps: Batches whose gradients are added up before the optimizer steps.
            **options: As for `LocalStep.teach`, such as `learned`, to step each block at once.

        Yields:
            The report, filled as the forward pass comes by the ends of the blocks.

        Raises:
            TargetError: If no label of the batch counts.
        """
        self.begin_step(step)
        targets, scale = self.read_targets(inputs, seed=(seed, step)), 1.0
        if targets is not None:
            if targets.elements == 0:
                raise TargetError(
                    "No label of this batch counts: all are -100. It teaches nothing, and the model's own loss would "
                    "not be a number. Leave the batch out."
                )
            scale = loss_scale(targets, None, processes=1, accumulation_steps=accumulation_steps)
        with self.step.teach(targets, inputs=inputs, scale=scale, **options) as report:
            yield report

    def set_learning_rates_(self, optimizer: torch.optim.Optimizer, *, has_schedule: bool = False) -> bool:
        """Give the groups of an optimizer of all parameters the learning rates that the config asks for.

        Args:
            optimizer: The optimizer, changed in place, before a schedule is made for it.
            has_schedule: Whether it has one already, which is an error if a rate is to be changed.

        Returns:
            Whether blocks learn as the config has it; else at one rate, because the optimizer cannot have several and
            nobody has asked for them.

        Raises:
            UnsupportedSettingError: If the optimizer cannot have different rates.
        """
        decay, feedback_rate = self.config.block_lr_decay, self.config.feedback_learning_rate
        asked = {
            "block_lr_decay": decay not in (None, 1) and self.chooses_rates,
            "feedback_learning_rate": feedback_rate is not None,
        }
        return scale_learning_rates_(
            optimizer,
            self._learning_rate_factors(decay),
            rates=rates_of_feedback(self.heads, feedback_rate),
            option=" with ".join(name for name, is_asked in asked.items() if is_asked),
            has_schedule=has_schedule,
        )

    def _learning_rate_factors(self, decay: float | None) -> dict[nn.Parameter, float]:
        """Return what the learning rate of each parameter is multiplied with.

        A head has the run's rate, but for copies that it trains: they learn as fast as what they are copies of.
        """
        factors, originals = factors_by_block(self.parameters, decay), self.originals
        return factors | {mine: factors.get(originals.get(mine), 1.0) for mine in self.heads.parameters()}

    def describe(self) -> str:
        """Return the cut as a table: block, layers, parameters of block and head, cost of the head, its kind."""
        model, cut = self.module.model, self.cut
        return table_of_blocks(model, cut, self.config, self.parameters, self.heads, self.head_costs)


def fingerprint_of(model: nn.Module, *, trained: bool) -> tuple[Any, ...]:
    """Return the name, identity and shape of every parameter of a model, and if that matters whether it learns."""
    return tuple(
        (name, id(parameter), parameter.shape, trained and parameter.requires_grad)
        for name, parameter in model.named_parameters()
    )
