"""How the trainer takes one step: a forward pass that teaches block by block, then clipping and stepping by block."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hf_blocklocal.anatomy.lending import taken_by
from hf_blocklocal.errors import NonFiniteLossError
from hf_blocklocal.targets.batch import Targets
from hf_blocklocal.teaching.bootstrap import bootstrap_weight
from hf_blocklocal.teaching.loss_scale import custom_loss, loss_scale
from hf_blocklocal.teaching.polish import is_global
from hf_blocklocal.teaching.report import StepReport
from hf_blocklocal.trainer.scaling import ScalesBlocks


class StepsBlocks(ScalesBlocks):
    """Teaches, averages, clips and steps each block by itself. With a single block, every method is the parent's."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Let every block but the last learn inside the forward pass of the parent's step, which teaches the last.

        Returns:
            The loss of the last block that is here, detached.
        """
        with self._session():
            self._check_overrides()
            return self._training_step(model, inputs, num_items_in_batch)

    def _training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        model.train()
        if self.assembly.last == 0:
            loss = super().training_step(self._forward, inputs, num_items_in_batch)
            self._finish_block(0, StepReport([loss]))
            return loss
        assembly, inputs = self.assembly, self._batch_to_read(inputs)
        assembly.begin_step(self.state.global_step)
        seed = self._seed_of_micro_batch()
        targets = assembly.read_targets(inputs, seed=seed)
        in_global_step = is_global(self.state.global_step, self.state.max_steps, self.block_local)
        keeps_company = self._keeps_company(learns=len(targets) > 0)
        if keeps_company:
            inputs = self._with_any_labels(inputs)
            targets = assembly.read_targets(inputs, seed=seed)
        elif len(targets) == 0:
            return self._skip_batch(in_global_step=in_global_step)
        if in_global_step:
            return self._global_step(inputs, num_items_in_batch)
        self._announce(inputs, "step", *seed[1:3])
        lesson = self._lesson(targets, inputs, num_items_in_batch, seed, learns=not keeps_company)
        with lesson as report, self._company(keeps_company):
            loss = self._teach_here(inputs, self._items_for_model(num_items_in_batch))
        if loss is not None:
            report.losses.append(loss)
        self._check_finite(report)
        if loss is not None:
            self._finish_block(assembly.last, report)
        completes_step = self.accelerator.sync_gradients
        if keeps_company:
            self._meter.skip(completes_step=completes_step)
            return torch.zeros((), device=self.args.device)
        self._meter.add(report.losses, halves=report.halves, targets=report.targets, completes_step=completes_step)
        return self._loss_for_parent(report.losses[-1])

    def _lesson(
        self,
        targets: Targets,
        inputs: Mapping[str, Any],
        num_items_in_batch: Any,
        seed: tuple[int, ...],
        *,
        learns: bool,
    ) -> AbstractContextManager[StepReport]:
        """Return the context in which a forward pass teaches every block but the last."""
        processes = self._replicas if self.args.average_tokens_across_devices else 1
        step, accumulation = self.state.global_step, self.current_gradient_accumulation_steps
        return self.assembly.step.teach(
            targets,
            scale=loss_scale(targets, num_items_in_batch, processes=processes, accumulation_steps=accumulation),
            backward=self.accelerator.backward if learns else self._backward_to_nothing,
            learned=self._finish_block,
            inputs=taken_by(self.model, inputs),
            custom_loss=custom_loss(
                self.compute_loss_func, inputs.get("labels"), targets, num_items_in_batch, processes=processes
            ),
            heads_only=step < self.block_local.head_warmup_steps,
            bootstrap=bootstrap_weight(step, self.state.max_steps, self.block_local),
            seed=seed,
        )

    def _global_step(self, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """Let all blocks learn from the model's own loss, as the parent does."""
        loss = super().training_step(self._forward, inputs, self._items_for_model(num_items_in_batch))
        StepReport([loss], first=self.assembly.last).check_finite(self.state.global_step + 1)
        if self.accelerator.sync_gradients:
            self._updates.average(*self.assembly.parameters, wait=True)
        self._meter.add_global(loss, completes_step=self.accelerator.sync_gradients)
        return loss

    def _seed_of_micro_batch(self) -> tuple[int, ...]:
        """Count micro-batches, so that each draws negatives and noise of its own and a resumed run draws the same."""
        micro_batch = self._micro_batch
        self._micro_batch = 0 if self.accelerator.sync_gradients else micro_batch + 1
        replica = self.args.process_index if self._chain is None else self._chain.replica
        return self.args.seed, self.state.global_step, micro_batch, replica

    def _items_for_model(self, num_items_in_batch: Any) -> Any:
        """Keep the count from a model that would ignore it, so that the parent averages over accumulation steps."""
        own = self.compute_loss_func is not None or self.label_smoother is not None
        heeded = self.assembly.counts_items or own or getattr(self, "loss_is_scaled_for_ga", None) is True
        return num_items_in_batch if heeded else None

    def _finish_block(self, block: int, report: StepReport) -> None:
        """Average the gradients of a block that has learned, and step it if it is to be stepped at once."""
        if not self.accelerator.sync_gradients:
            return
        parameters, at_once = self.assembly.parameters[block], self.block_local.step_per_block
        alone = self._chain is not None
        self._updates.average(parameters, wait=block == self.assembly.last or at_once or alone)
        if block < self.assembly.last and at_once:
            optimizer, max_norm = self._inner_optimizer, self.args.max_grad_norm or float("inf")
            try:
                with self._settled(block, optimizer):
                    step = self._checked_step
                    self._updates.step_(block, parameters, optimizer, max_norm=max_norm, checked_step=step)
            except NonFiniteLossError:
                self._check_finite(report)  # says more, and is looked at only now: reading it waits for a GPU
                raise

    def _skip_batch(self, *, in_global_step: bool) -> Tensor:
        """Learn nothing from a micro-batch without targets, but keep the other processes company."""
        self._meter.skip(completes_step=self.accelerator.sync_gradients, in_global_step=in_global_step)
        if self.accelerator.sync_gradients:
            self._updates.average(*self._blocks_here, wait=True)
        return torch.zeros((), device=self.args.device)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip each block by itself, in place of all parameters together. Returns the norm of all blocks."""
        return self._clip_blocks(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        """Measure each block by itself where nothing is clipped."""
        return self._clip_blocks(float("inf")) if grad_norm is None else grad_norm

    def _clip_blocks(self, max_norm: float) -> Tensor:
        self._check_taught()
        self._unscale()
        return self._updates.clip_(self.assembly.parameters, max_norm=max_norm, checked_step=self._checked_step)

    @property
    def _checked_step(self) -> int | None:
        """The step under way, where a gradient that is not finite is an error; a scaler has looked at it already."""
        checked = self.assembly.last > 0 and self.accelerator.scaler is None
        return self.state.global_step + 1 if checked else None
