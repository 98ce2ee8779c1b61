"""`BlockLocalTrainer`: the transformers Trainer with a backward pass per block.

Glue only. Every override replaces or surrounds one line of the parent and leaves the work to another module.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import Trainer

from hf_blocklocal.assembly import Assembly, assemble, check_structure
from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.config.settings import (
    check_arguments,
    check_launcher,
    check_loss_settings,
    check_placement,
    checked_config,
)
from hf_blocklocal.errors import NonFiniteLossError
from hf_blocklocal.optim.anchor import Anchor
from hf_blocklocal.optim.clipping import add_heads_, check_steps_by_block
from hf_blocklocal.optim.data_parallel import broadcast_from_first
from hf_blocklocal.records.meters import BlockLossMeter
from hf_blocklocal.targets.probe import dataset_to_trace, first_batch, random_state_kept, with_own_generators
from hf_blocklocal.targets.scaling import custom_loss, loss_scale
from hf_blocklocal.teaching.bootstrap import bootstrap_weight
from hf_blocklocal.teaching.evaluation import BlockScores
from hf_blocklocal.teaching.polish import is_global
from hf_blocklocal.teaching.report import StepReport
from hf_blocklocal.teaching.taught_model import name_of_original
from hf_blocklocal.trainer.cards import WritesCards
from hf_blocklocal.trainer.compilation import layers_compiled
from hf_blocklocal.trainer.evaluating import EvaluatesBlocks
from hf_blocklocal.trainer.overriding import ChecksOverrides
from hf_blocklocal.trainer.pushing import PushesRuns
from hf_blocklocal.trainer.saving import SavesBlocks
from hf_blocklocal.trainer.scaling import ScalesBlocks


logger = logging.getLogger(__name__)


class BlockLocalMixin(ChecksOverrides, EvaluatesBlocks, SavesBlocks, PushesRuns, ScalesBlocks, WritesCards):
    """What makes a block-local trainer of any `Trainer` whose loss comes from `compute_loss` and labels.

    Put it first: `class MyTrainer(BlockLocalMixin, SFTTrainer)`. The trainer's own `compute_loss` teaches the last
    block, in one forward pass per batch; the heads of the others learn to predict the labels.

    Args:
        *args: As for the trainer it is mixed into.
        block_local: How to cut and teach the model.
        **kwargs: As for that trainer.

    Raises:
        BlockLocalError: If arguments, model and config do not go together. What takes a batch to find out is raised
            by `train()`, before the first step.
    """

    def __init__(self, *args: Any, block_local: BlockLocalConfig | None = None, **kwargs: Any) -> None:
        self.block_local = checked_config(block_local)
        self._assembly: Assembly | None = None
        self._anchor: Anchor | None = None
        self._scores: BlockScores | None = None
        super().__init__(*args, **kwargs)
        self._forget_run()
        check_structure(self.model, self.block_local)
        self._lay_out()
        if self.block_local.num_blocks > 1:
            check_placement(self.model, model_parallel=self.is_model_parallel and self._layout is None)
        self._take_station()

    def _forget_run(self) -> None:
        """Start without anything that an earlier, perhaps interrupted, run has left behind."""
        self._updates = self._new_updates()
        self._meter = BlockLossMeter(None if self._chain is None else self._chain.block)
        self._micro_batch = 0
        self._logged_loss = 0.0

    @property
    def assembly(self) -> Assembly:
        """The cut model with its heads, made from the first examples of the data set when first asked for."""
        if self._assembly is None or self._assembly.module.model is not self.model:
            smoothing = 0.0 if self.label_smoother is None else self.args.label_smoothing_factor
            with random_state_kept():
                batch = self._first_batch() if self.block_local.num_blocks > 1 else {}
                assembly = assemble(
                    self.model, self.block_local, batch, label_smoothing=smoothing, seed=self.args.seed
                )
            if assembly.task is not None:
                custom = self.compute_loss_func is not None
                check_loss_settings(assembly.task, self.block_local, label_smoothing=smoothing, custom_loss=custom)
            self._assembly, self._anchor = assembly, None
            logger.info("Blocks of %s:\n%s", type(self.model).__name__, assembly.describe())
        return self._assembly

    def _first_batch(self) -> Mapping[str, Any]:
        """Collate the first examples as the data loader would."""
        dataset = dataset_to_trace(self.train_dataset, self.eval_dataset)
        collator = with_own_generators(self.data_collator)
        collate = self._get_collator_with_removed_columns(collator, description="traced")
        batch = self._prepare_inputs(first_batch(dataset, collate, min(2, self.args.per_device_train_batch_size)))
        apart = self.block_local.blocks_apart
        return send_to_device(batch, next(self.model.parameters()).device) if apart else batch

    @property
    def anchor(self) -> Anchor | None:
        """Where the weights below the last block started, if they are pulled there; made when first asked for."""
        assembly = self.assembly
        if self._anchor is None and self.block_local.anchor > 0 and assembly.last > 0:
            weights = assembly.lower_weights()
            alone = self._chain is not None
            self._anchor = Anchor(weights, self.block_local.anchor, alone=alone, part_of=self._part_of)
        return self._anchor

    # ---- Setting up ----

    def create_accelerator_and_postprocess(self) -> None:
        """Refuse what cannot work before the parent sets it up, and `DataParallel` with it."""
        check_arguments(self.args)
        if self.args.n_gpu > 1:
            if self.block_local.placement == "auto":
                logger.warning(
                    "Training on one of %d GPUs, unless the model has a device map; use accelerate launch or "
                    "placement='devices' for all of them.",
                    self.args.n_gpu,
                )
            self.args._n_gpu = 1
        super().create_accelerator_and_postprocess()
        check_launcher(self.accelerator.distributed_type)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Optimize the heads together with the model, in place of the model alone."""
        if self._is_own_shard(self._inner_optimizer):
            return self.optimizer
        given, has_schedule = self.optimizer, self.lr_scheduler is not None
        with self._parts_in_place():
            optimizer = super().create_optimizer(self.assembly.module)
        if given is not None:
            heads, originals = list(self.assembly.heads.parameters()), self.assembly.originals
            add_heads_(given, heads, originals=originals, has_schedule=has_schedule)
        self.assembly.set_learning_rates_(self._inner_optimizer, has_schedule=has_schedule)
        self._keep_own_shard(self._inner_optimizer, given=given is not None)
        if self.block_local.step_per_block and self.assembly.last > 0:
            check_steps_by_block(self._inner_optimizer)
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Let copies that a head trains decay as the weights that they are copies of."""
        names = set(super().get_decay_parameter_names(model))
        return [name for name in sorted(names) if name_of_original(name) in names]

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Prepare the model for autocast and compilation, without DDP, and put the heads beside it."""
        if not training:
            return super()._wrap_model(model, training, dataloader)
        self._forget_run()
        self.assembly.check_last_block_learns()
        module = self.assembly.module
        layers = [self.model.get_submodule(path) for path in self.assembly.cut.layers]
        with layers_compiled(layers, self.accelerator.state.dynamo_plugin, overlap=self.block_local.overlap):
            self._forward = self.accelerator.prepare_model(
                self.model, device_placement=not self._is_apart, evaluation_mode=True
            )
        self._check_cut_agrees()
        if self._replicas > 1:
            tensors = [*module.parameters(), *module.buffers()]
            here = [tensor for tensor in tensors if not tensor.is_meta and tensor not in self._parts]
            self._together(broadcast_from_first, here, self._updates.group)
        if self.anchor is not None:
            self.anchor.attach(self._inner_optimizer)
        self._scale_per_block(self._inner_optimizer)
        return module

    # ---- One step ----

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
        processes = self._replicas if self.args.average_tokens_across_devices else 1
        self._announce(inputs, "step", *seed[1:3])
        lesson = assembly.step.teach(
            targets,
            scale=loss_scale(
                targets,
                num_items_in_batch,
                processes=processes,
                accumulation_steps=self.current_gradient_accumulation_steps,
            ),
            backward=self._backward_to_nothing if keeps_company else self.accelerator.backward,
            learned=self._finish_block,
            inputs=inputs,
            custom_loss=custom_loss(
                self.compute_loss_func, inputs.get("labels"), targets, num_items_in_batch, processes=processes
            ),
            heads_only=self.state.global_step < self.block_local.head_warmup_steps,
            bootstrap=bootstrap_weight(self.state.global_step, self.state.max_steps, self.block_local),
            seed=seed,
        )
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

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the loss of every block to the training logs."""
        if self.assembly.last > 0 and ("loss" in logs or self._ends_run_apart(logs)):
            steps, last = self._meter.steps, f"block_{self.assembly.last}/loss"
            blocks, processes = self.assembly.cut.num_blocks, self.args.world_size
            overflows = None if self._scaler is None else self._scaler.overflows
            said = self._together(self._meter.pop, blocks, self.args.device, processes, overflows=overflows)
            self._logged_loss += steps * said[last]
            logs |= (said | self._of_all_blocks(logs, said[last])) if "loss" in logs else self._of_run()
        super().log(logs, *args, **kwargs)


class BlockLocalTrainer(BlockLocalMixin, Trainer):
    """Fine-tune a transformers model block by block, each block from its own loss.

    Takes the arguments of `transformers.Trainer` and one more. With one block it is the `Trainer`, to the bit. With
    more, these things differ, and nothing else:

    - `max_grad_norm` clips the gradient of each block by itself: a norm over all of them would couple the blocks.
    - `loss` in the logs is the last block's, comparable with `Trainer`; `block_k/loss` is that of block k. Where the
      message from the target is learned, `block_k/kl` and `block_k/nll` are the halves of the bound. Evaluation adds
      what each block's head would have predicted, `eval_block_k_accuracy` and `eval_block_k_loss`.
    - Where the model's own loss ignores `num_items_in_batch`, it is divided by the accumulation steps.
    - The lower blocks of a pretrained model learn at smaller rates, the lowest at 0.3 of the run's (`block_lr_decay`).
    - A micro-batch in which every label is -100 is skipped and counted as `skipped_batches` in the logs.
    - A loss or gradient that is not finite stops the run before it touches a weight.
    - In fp16 every block has a loss scale of its own; one that overflows is not stepped (`block_k/overflows`).
    - A `compute_loss_func` teaches the heads too, where a sample has one target; `eval_block_k_loss` stays their own.
    - With `global_every` or `polish`, some steps are backpropagation; `block_k/loss` is over the others.
    - One process uses one GPU, unless `placement` says otherwise: there is no `DataParallel`.

    Args:
        *args: As for `transformers.Trainer`.
        block_local: How to cut and teach the model.
        **kwargs: As for `transformers.Trainer`.

    Raises:
        BlockLocalError: If arguments, model and config do not go together. What takes a batch to find out is raised
            by `train()`, before the first step.
    """
