"""How the trainer works with one block of several in this process, and the others in other processes."""

from __future__ import annotations

import shutil
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_pt_utils import nested_detach

from hf_blocklocal.blocks import EndOfBlock
from hf_blocklocal.data_parallel import sum_over_processes
from hf_blocklocal.errors import BlockLocalError, BlockPeerError
from hf_blocklocal.parallel.chain import Chain, ReplicaMesh, form_chains
from hf_blocklocal.parallel.gathering import gather_samples, gather_to_first, share_from_last, sum_over_blocks
from hf_blocklocal.parallel.leaving import Leaving
from hf_blocklocal.parallel.shards import OptimizerShard, plain_values_in, state_of, tensors_in
from hf_blocklocal.parallel.stationing import Stationing, Whole
from hf_blocklocal.probe import random_state_kept
from hf_blocklocal.settings import (
    check_block_parallel,
    check_model_given,
    check_optimizer_not_given,
    check_outputs_of_all_layers,
)


class PlacesBlocks(Trainer):
    """Trains one block per process, where the config asks for it. Without, every method is the parent's."""

    _chain: Chain | None = None
    _stationing: Stationing | None = None
    _shard: OptimizerShard | None = None
    _leaving: Leaving | None = None

    # ---- Setting up ----

    def create_accelerator_and_postprocess(self) -> None:
        """Put this process in its place, and let the processes of a chain read the same batches."""
        super().create_accelerator_and_postprocess()
        if self.block_local.block_parallel_size == 1:
            return
        check_block_parallel(self.args, self.block_local)
        self._chain = form_chains(
            self.block_local.num_blocks, self.args.device, peer_timeout=self.block_local.peer_timeout
        )
        self._leaving = Leaving(self._chain, save=self.block_local.save_on_exit)
        self.accelerator.dataloader_config.dispatch_batches = False
        self.accelerator.state.device_mesh = ReplicaMesh(self._chain)
        self.accelerator.pad_across_processes = partial(self._together, self.accelerator.pad_across_processes)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Leave the model where it is until only this process's block is left of it."""
        if self._chain is None:
            super()._move_model_to_device(model, device)
        elif self._stationing is not None:
            self._stationing.move_(device)

    def _take_station(self) -> None:
        """Let go of what belongs to other processes."""
        if self._chain is not None:
            check_model_given(self.model_init is None)
            check_outputs_of_all_layers(self.model)
            assembly = self.assembly
            with random_state_kept():
                batch = self._first_batch()
            try:
                self._stationing = Stationing(assembly, self._chain, batch)
            except BlockLocalError as error:
                self._chain.fail(error)
                raise
            self._stationing.move_(self.args.device)
            self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)

    def _keep_own_shard(self, optimizer: torch.optim.Optimizer, *, given: bool) -> None:
        """Leave the optimizer only the parameters that this process trains."""
        if self._chain is not None:
            check_optimizer_not_given(given)
            self._shard = OptimizerShard(optimizer, self._stationing.names, self._stationing.is_mine)

    def _is_own_shard(self, optimizer: torch.optim.Optimizer | None) -> bool:
        """Tell whether an optimizer is that of an earlier run, which has only the parameters that are here."""
        return self._shard is not None and self._shard.optimizer is optimizer

    @property
    def _blocks_here(self) -> Sequence[Sequence[nn.Parameter]]:
        """The parameters of the blocks that this process trains."""
        parameters = self.assembly.parameters
        return parameters if self._chain is None else parameters[self._chain.block : self._chain.block + 1]

    @property
    def _replicas(self) -> int:
        """Copies of every block."""
        return self.args.world_size if self._chain is None else self._chain.num_replicas

    def get_train_dataloader(self) -> Any:
        """Let the workers of all processes of a chain draw the same."""
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # accelerate wraps the one that starts the workers
        seeds = getattr(inner, "worker_init_fn", None)
        if self._chain is not None and isinstance(seeds, partial) and "rank" in seeds.keywords:
            inner.worker_init_fn = partial(seeds, rank=self._chain.replica)
        return loader

    def get_tp_size(self) -> int:
        """Return how many processes read the same batch."""
        return super().get_tp_size() * (1 if self._chain is None or self._counting else self._chain.num_blocks)

    # ---- Training ----

    _counting = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Tell the other processes why, if this one fails."""
        with nullcontext() if self._leaving is None else self._leaving.in_run(), self._session():
            return self._as_one_process_says(super().train(*args, **kwargs))

    def _as_one_process_says(self, output: Any) -> Any:
        """Return what a run has come to with the loss of the last block, as the logs have it."""
        if self._chain is None or not hasattr(output, "_replace"):
            return output
        return output._replace(training_loss=output.metrics["train_loss"])

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Exchange messages with the other processes inside the `with`, and tell them why if this one fails.

        A session within a session is part of it: what is on its way at its end may stay there.
        """
        if self._chain is None or self._chain.in_session:
            yield
            return
        try:
            with self._leaving, self._chain.session():
                yield
                if self.assembly.copies is not None:
                    self.assembly.copies.fetch()
        except BaseException as error:
            behind = self._told_to_others(error)
            if behind is not error:
                raise behind from error
            raise

    def _told_to_others(self, error: BaseException) -> BaseException:
        """Return what is behind an error that ends this process, told to the others."""
        try:
            self._chain.explain(error)
        except BlockPeerError as behind:
            error = behind
        self._chain.fail(error)
        if hasattr(error, "add_note"):
            error.add_note(f"In {self._chain.name}, at step {self.state.global_step + 1}.")
        return error

    def _together(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run what processes do together, and return what it returns; a chain looks around while it waits."""
        return function(*args, **kwargs) if self._chain is None else self._chain.together(function, *args, **kwargs)

    def _meet(self) -> None:
        """Wait until all processes of chains are here, so that the parent's collectives cannot wait for a lost one."""
        if self._chain is not None:
            self._chain.meet()

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count over the copies of this block alone: the other processes of the chain have read the same."""
        if self._chain is None:
            return super()._get_num_items_in_batch(batch_samples, device)
        average, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        self._counting = True
        try:
            count = super()._get_num_items_in_batch(batch_samples, device)
        finally:
            self.args.average_tokens_across_devices, self._counting = average, False
        if average and self._chain.num_replicas > 1 and isinstance(count, Tensor):
            count = self._together(sum_over_processes, count, self._chain.replicas)
        return count

    def _teach_here(self, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor | None:
        """Run the forward pass, and the backward pass of the last block if it is here.

        Returns:
            The loss of the last block; nothing if it is elsewhere.
        """
        if self._chain is None or self._chain.is_last:
            return super().training_step(self._forward, inputs, num_items_in_batch)
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        with suppress(EndOfBlock), self.compute_loss_context_manager():
            self._forward(**inputs)
        return None

    def store_flos(self) -> None:
        """Wait for all before the parent adds up over them."""
        self._meet()
        super().store_flos()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count the operations of a chain once: the parent counts those of the whole model, and adds up processes."""
        return super().floating_point_ops(inputs) if self._chain is None or self._chain.block == 0 else 0

    def _announce(self, inputs: Mapping[str, Any], *where: int | str) -> None:
        """Say what the messages of the micro-batch to come belong to."""
        if self._chain is not None:
            self._chain.peers.step = self.state.global_step
            self._stationing.announce(inputs, where)

    # Sum over optimizer steps of the last block's loss, as far as it has been logged.
    _told = 0.0

    def _of_all_blocks(self, logs: Mapping[str, float], last_loss: float) -> dict[str, float]:
        """Return what one process would have logged, in place of what this one knows by itself."""
        if self._chain is None:
            return {}
        said = {"loss": last_loss}
        if "grad_norm" in logs:
            square = torch.tensor([logs["grad_norm"]], dtype=torch.float64, device=self.args.device) ** 2
            said["grad_norm"] = sum_over_blocks(self._chain, square).sqrt().item()
        return said

    def _ends_run_of_chain(self, logs: Mapping[str, float]) -> bool:
        return self._chain is not None and "train_loss" in logs

    def _of_run(self) -> dict[str, float]:
        """Return the mean loss of the last block over the steps of the run."""
        return {"train_loss": self._told / max(self.state.global_step - self._initial_global_step, 1)}

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Save and stop, if this process has been told to end."""
        if self._leaving is not None and self._leaving.due(self.state.global_step):
            self.control.should_save = self.control.should_training_stop = True
        if self.control.should_log or self.control.should_save:
            self._meet()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # ---- Evaluation ----

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Gather over the copies of the last block alone."""
        if self._chain is not None:
            self.gather_function = self._gather_samples
        with self._session():
            return super().evaluation_loop(*args, **kwargs)

    def _gather_samples(self, value: Any) -> Any:
        if self._chain is None:
            return self.accelerator.gather_for_metrics(value)
        return gather_samples(self._chain, value, self.accelerator.gradient_state)

    def _sum_over_blocks(self, values: Tensor) -> Tensor:
        return values if self._chain is None else sum_over_blocks(self._chain, values)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the block that is here; every process of a chain gets what the last one has predicted."""
        if self._chain is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **kwargs)
        inputs = self._prepare_inputs(inputs)
        self._announce(inputs, "evaluation")
        if self._chain.is_last:
            if ignore_keys is None:
                config = getattr(self.model, "config", None)
                ignore_keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
            ignored = [*ignore_keys, *self._stationing.unknown_outputs]
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignored, **kwargs)
            share_from_last(self._chain, (loss, logits), self.args.device)
            return loss, logits, labels
        with suppress(EndOfBlock), torch.no_grad(), self.compute_loss_context_manager():
            model(**inputs)
        loss, logits = share_from_last(self._chain, None, self.args.device)
        labels = tuple(nested_detach(inputs[name]) for name in self.label_names if inputs.get(name) is not None)
        with_labels = not prediction_loss_only and len(labels) == len(self.label_names) > 0
        return loss, logits, (labels if len(labels) > 1 else labels[0]) if with_labels else None

    def _cut_here(self) -> Any:
        """Cut the forward pass that runs inside the `with`, if this process has but one block."""
        if self._chain is None:
            return nullcontext()
        return self.assembly.step.boundaries.attached(lambda *_: None)

    def whole_model(self) -> nn.Module:
        """Return the whole model as it is now, for example to generate with: in every process, on its device.

        With all blocks in one process that is the model that is trained; else it is a copy of it. All processes must
        call it together.
        """
        if self._chain is None:
            return self.model
        with self._session():
            return self._stationing.whole_model().to(self.args.device)

    # ---- Checkpoints ----

    def _whole_state(self) -> AbstractContextManager[Whole | None]:
        """Let all weights be asked for inside the `with` where checkpoints are written, if no process has them all."""
        return nullcontext() if self._chain is None else self._stationing.gathered()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write what one process would have written."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self._chain is not None:
            state = self._shard.state_by_name()
            tensors, plain = gather_to_first(self._chain, tensors_in(state), plain_values_in(state))
            if self._chain.writes:
                whole = self._shard.whole(state_of(tensors, ChainMap(*plain)))
                torch.save(whole, Path(output_dir) / OPTIMIZER_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        """Write the random state of every chain once, as data-parallel processes would."""
        if self._chain is None:
            super()._save_rng_state(output_dir)
        elif self._chain.block == 0:
            Path(output_dir).mkdir(parents=True, exist_ok=True)  # another chain may be here before the one that writes
            with TemporaryDirectory() as folder:
                super()._save_rng_state(folder)
                shutil.move(Path(folder) / self._random_state_file, Path(output_dir) / self._random_state_of_replica)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Read the random state of this chain, whoever wrote it."""
        names = [] if self._chain is None or checkpoint is None else [self._random_state_of_replica, "rng_state.pth"]
        found = [Path(checkpoint) / name for name in names if (Path(checkpoint) / name).is_file()]
        if not found:
            return super()._load_rng_state(checkpoint)
        with TemporaryDirectory() as folder:
            shutil.copy(found[0], Path(folder) / self._random_state_file)
            return super()._load_rng_state(folder)

    @property
    def _random_state_file(self) -> str:
        return f"rng_state_{self.args.process_index}.pth"

    @property
    def _random_state_of_replica(self) -> str:
        return f"rng_state_{self._chain.replica}.pth" if self._chain.num_replicas > 1 else "rng_state.pth"
