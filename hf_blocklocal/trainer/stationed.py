"""How the trainer gives each process its block: what it reads, what it keeps, how it meets the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_blocklocal.config.refusals import (
    check_block_parallel,
    check_can_be_told_to_end,
    check_has_values,
    check_model_given,
    check_optimizer_not_given,
    check_outputs_of_all_layers,
)
from hf_blocklocal.errors import BlockLocalError
from hf_blocklocal.optim.collectives import check_same_cut_everywhere
from hf_blocklocal.parallel.chain import Chain, ReplicaMesh, form_chains
from hf_blocklocal.parallel.leaving import Leaving, LeavingAlone
from hf_blocklocal.parallel.sharding import ShardedLayers, part_like, whole_like
from hf_blocklocal.parallel.shards import OptimizerShard, check_is_elementwise
from hf_blocklocal.parallel.stationing import Stationing
from hf_blocklocal.randomness import random_state_kept


class TakesStation(Trainer):
    """Puts this process in its place, where the config asks for a block per process."""

    _chain: Chain | None = None
    _stationing: Stationing | None = None
    _shard: OptimizerShard | None = None
    _leaving: Leaving | LeavingAlone | None = None
    _sharded: ShardedLayers | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """Put this process in its place, and let the processes of a chain read the same batches."""
        super().create_accelerator_and_postprocess()
        if self.block_local.block_parallel_size == 1:
            if self.block_local.save_on_exit:
                check_can_be_told_to_end(self.args.world_size)
                self._leaving = LeavingAlone()
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
        if self._stationing is None:
            check_has_values(model)
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
            if self.block_local.shard_replicas and self._chain.num_replicas > 1:
                self._share_out()

    def _share_out(self) -> None:
        """Keep a part of the block's layers, and leave the rest to the processes that hold the same block."""
        try:
            self._assembly = self._stationing.shard_()
        except BlockLocalError as error:
            self._chain.fail(error)
            raise
        self._sharded = self._stationing.sharded

    def _parts_in_place(self) -> AbstractContextManager[None]:
        """Let an optimizer be made inside the `with`, of the parts that are here of what is shared out."""
        return nullcontext() if self._sharded is None else self._sharded.parts_in_place()

    def _part_of(self, name: str, whole: Tensor) -> Tensor:
        """Return what this process has of a tensor like a parameter of the model."""
        parameter = self.model.get_parameter(name)
        return part_like(parameter, whole) if parameter in self._parts else whole

    def _whole_of(self, name: str, part: Tensor) -> Tensor:
        """Return a tensor like what this process has of a parameter of the model as one like the whole parameter."""
        parameter = self.model.get_parameter(name)
        return whole_like(parameter, part) if parameter in self._parts else part

    @property
    def _parts(self) -> Mapping[nn.Parameter, nn.Parameter]:
        return {} if self._sharded is None else self._sharded.parts

    def _sum_of_parts(self, values: Tensor) -> Tensor:
        """Return the sum over the processes that share out this block of what each says of its parts."""
        return values if self._sharded is None else self._sharded.sum(values)

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer itself, without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _check_cut_agrees(self) -> None:
        """Refuse a cut that depends on the batch, where processes with all blocks have traced different ones."""
        if self.block_local.balance == "cost" and self._chain is None:
            check_same_cut_everywhere(self.assembly.cut.boundaries, self.args.world_size)

    def _keep_own_shard(self, optimizer: torch.optim.Optimizer, *, given: bool) -> None:
        """Leave the optimizer only the parameters that this process trains."""
        if self._chain is not None:
            check_optimizer_not_given(given)
            if self._sharded is not None:
                check_is_elementwise(optimizer)
            station = self._stationing
            self._shard = OptimizerShard(optimizer, station.names, station.is_mine, self._parts)

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

    def _together(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run what processes do together, and return what it returns; a chain looks around while it waits."""
        return function(*args, **kwargs) if self._chain is None else self._chain.together(function, *args, **kwargs)

    def _wait_for_shared_layers(self) -> None:
        """Wait until a GPU has brought together all layers that it was told to; a chain looks around meanwhile."""
        if self._sharded is not None:
            self._together(lambda: None)

    def _meet(self) -> None:
        """Wait until all processes of chains are here, so that the parent's collectives cannot wait for a lost one."""
        if self._chain is not None:
            self._chain.meet()
