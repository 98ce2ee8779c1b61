"""`BlockLocalTrainer`: the transformers Trainer with a backward pass per block.

Glue only. Every override replaces or surrounds one line of the parent and leaves the work to another module.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import Trainer

from hf_blocklocal.anatomy.embeddings import input_embedding, output_embedding
from hf_blocklocal.anatomy.lending import taken_by
from hf_blocklocal.assembling import assemble, check_structure
from hf_blocklocal.assembly import Assembly
from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.config.refusals import (
    check_arguments,
    check_launcher,
    check_loss_settings,
    check_placement,
    checked_config,
)
from hf_blocklocal.optim.anchor import Anchor
from hf_blocklocal.optim.collectives import broadcast_from_first
from hf_blocklocal.optim.stepping import add_heads_, add_untied_, check_steps_by_block
from hf_blocklocal.randomness import random_state_kept
from hf_blocklocal.records.meters import BlockLossMeter
from hf_blocklocal.targets.probe import dataset_to_trace, first_batch, first_of_loader, with_own_generators
from hf_blocklocal.teaching.evaluation import BlockScores
from hf_blocklocal.teaching.taught_model import name_of_original
from hf_blocklocal.trainer.cards import WritesCards
from hf_blocklocal.trainer.compilation import layers_compiled
from hf_blocklocal.trainer.evaluating import EvaluatesBlocks
from hf_blocklocal.trainer.overriding import ChecksOverrides
from hf_blocklocal.trainer.pushing import PushesRuns
from hf_blocklocal.trainer.saving import SavesBlocks
from hf_blocklocal.trainer.stepping import StepsBlocks


logger = logging.getLogger(__name__)


class BlockLocalMixin(ChecksOverrides, EvaluatesBlocks, SavesBlocks, PushesRuns, StepsBlocks, WritesCards):
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
        """Collate the first examples as the data loader would.

        Where a subclass has a loader of its own, which nobody else knows how to read for, that is asked if need be.
        """
        size = min(2, self.args.per_device_train_batch_size)
        try:
            dataset = dataset_to_trace(self.train_dataset, self.eval_dataset)
            collator = with_own_generators(self.data_collator)
            collate = self._get_collator_with_removed_columns(collator, description="traced")
            batch = first_batch(dataset, collate, size)
        except (TypeError, ValueError, LookupError, AttributeError):
            if not self._overrides("get_train_dataloader"):
                raise
            batch = first_of_loader(self.get_train_dataloader(), size)
        batch = taken_by(self.model, self._prepare_inputs(batch))
        apart = self.block_local.blocks_apart
        return send_to_device(batch, next(self.model.parameters()).device) if apart else batch

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Cut the model anew, if it has got other weights since it was cut, such as a larger embedding or adapters."""
        if self._assembly is not None and not self._is_apart and not self._assembly.still_fits():
            self._assembly = None
        return super().train(*args, **kwargs)

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
            source, head = input_embedding(self.model), output_embedding(self.model)
            if self.assembly.config.tied_weights == "untie" and None not in (source, head):
                add_untied_(given, head.weight, source.weight)
            heads, originals = list(self.assembly.heads.parameters()), self.assembly.originals
            add_heads_(given, heads, originals=originals, has_schedule=has_schedule)
        if not self.assembly.set_learning_rates_(self._inner_optimizer, has_schedule=has_schedule):
            self._learn_at_one_rate()
        self._keep_own_shard(self._inner_optimizer, given=given is not None)
        if self.block_local.step_per_block and self.assembly.last > 0:
            check_steps_by_block(self._inner_optimizer)
        return optimizer

    def _learn_at_one_rate(self) -> None:
        """Write down that blocks do, so that nobody is told otherwise."""
        self._assembly = replace(self.assembly, config=replace(self.assembly.config, block_lr_decay=1.0))

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

    # ---- Logging ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the loss of every block to the training logs of the parent, which tell the learning rate too."""
        of_steps = "loss" in logs and "learning_rate" in logs
        if (of_steps or self._ends_run_apart(logs)) and self.assembly.last > 0:
            steps, last = self._meter.steps, f"block_{self.assembly.last}/loss"
            blocks, processes = self.assembly.cut.num_blocks, self.args.world_size
            overflows = None if self._scaler is None else self._scaler.overflows
            said = self._together(self._meter.pop, blocks, self.args.device, processes, overflows=overflows)
            self._logged_loss += steps * said[last]
            logs |= (said | self._of_all_blocks(logs, said[last])) if of_steps else self._of_run()
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
