"""How the trainer works with the blocks of this process on several devices, none of which waits for a later one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn

from hf_blocklocal.config.refusals import check_model_given, check_outputs_of_all_layers, check_spread
from hf_blocklocal.devices.layout import Layout, find_layout
from hf_blocklocal.devices.ledger import Ledger
from hf_blocklocal.devices.spreading import Spread, gather_
from hf_blocklocal.optim.updates import BlockUpdates
from hf_blocklocal.randomness import random_state_kept
from hf_blocklocal.teaching.report import StepReport
from hf_blocklocal.trainer.placing import PlacesBlocks
from hf_blocklocal.trainer.running import ends_run


_APART = "blocks on several devices"


class SpreadsBlocks(PlacesBlocks):
    """Trains blocks on several devices, where model or config ask for it. Without, every method is the parent's."""

    _layout: Layout | None = None
    _spread: Spread | None = None
    _ledger: Ledger | None = None

    # ---- Setting up ----

    def _lay_out(self) -> None:
        """Decide where blocks are to lie, and bring the model together to be assembled."""
        layout = find_layout(self.model, self.block_local, processes=self.args.world_size)
        if layout is None:
            return
        check_model_given(self.model_init is None, _APART)
        check_outputs_of_all_layers(self.model, _APART)
        check_spread(self.args)
        self._layout, self.block_local = layout, layout.config
        self.accelerator.device_placement = False  # batches stay in main memory, where they are read
        remove_hook_from_submodules(self.model)
        gather_(self.model)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Leave a model where it is that is to be spread over devices."""
        if self.block_local.placement == "auto":
            super()._move_model_to_device(model, device)

    def _take_station(self) -> None:
        """Spread the blocks over their devices."""
        super()._take_station()
        if self._layout is not None:
            with random_state_kept():
                batch = self._first_batch()
            self._spread = Spread(self.assembly, self._layout.devices, batch)
            self._assembly = self._spread.assembly

    @property
    def _is_apart(self) -> bool:
        """Whether blocks lie in different places."""
        return self._chain is not None or self._spread is not None

    def _new_updates(self) -> BlockUpdates:
        """Return what averages, clips and steps the blocks of a run; it reads no norm that a device is still at."""
        if self._spread is None:
            replicas = None if self._chain is None else self._chain.replicas
            return BlockUpdates(self._replicas, replicas, self._together, sharded=self._sharded)
        self._ledger = Ledger()
        return BlockUpdates(1, check=self._ledger.note_norms, combine=self._ledger.keep_norms)

    # ---- Training ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the parent from looking at every loss, since what it is given here is always zero."""
        looks = self.args.logging_nan_inf_filter
        self.args.logging_nan_inf_filter = looks and self._spread is None
        try:
            output = super().train(*args, **kwargs)
            if self._spread is not None and hasattr(output, "_replace"):
                output = output._replace(training_loss=output.metrics["train_loss"])  # as the logs have it
            return output
        finally:
            self.args.logging_nan_inf_filter = looks

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count in main memory, where the batches are."""
        return super()._get_num_items_in_batch(batch_samples, device if self._spread is None else torch.device("cpu"))

    def _batch_to_read(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a batch where targets can be read from it: with blocks on several devices, in main memory."""
        return inputs if self._spread is not None else self._prepare_inputs(inputs)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Send every input to the device that needs it first."""
        return super()._prepare_inputs(inputs) if self._spread is None else self._spread.placed(inputs)

    def _check_finite(self, report: StepReport) -> None:
        """Stop before a loss that is not a number reaches a weight; with several devices, note it for the next log."""
        step = self.state.global_step + 1
        if self._spread is None:
            self._wait_for_shared_layers()
            report.check_finite(step)
        else:
            self._ledger.note_losses(report, step)

    def _loss_for_parent(self, loss: Tensor) -> Tensor:
        """Return what the parent adds up: the loss, or zero where that is on a device it would have to wait for."""
        return loss if self._spread is None else torch.zeros((), device=self.args.device)

    def _of_all_blocks(self, logs: Mapping[str, float], last_loss: float) -> dict[str, float]:
        """Return what the parent has not been told."""
        if self._spread is None:
            return super()._of_all_blocks(logs, last_loss)
        return {"loss": last_loss} | ({"grad_norm": self._ledger.grad_norm} if "grad_norm" in logs else {})

    def _ends_run_apart(self, logs: Mapping[str, float]) -> bool:
        return super()._ends_run_apart(logs) or (self._spread is not None and ends_run(logs))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Look whether all losses and gradients have been finite."""
        if self._ledger is not None:
            self._ledger.check(self.state.global_step)
        super().log(logs, *args, **kwargs)

    # ---- Checkpoints ----

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write no checkpoint that a loss or a gradient has spoilt."""
        if self._ledger is not None:
            self._ledger.check(self.state.global_step)
        super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Copy anew what lies on several devices."""
        super()._load_from_checkpoint(*args, **kwargs)
        self._renew()

    def _load_best_model(self) -> None:
        """Copy anew what lies on several devices."""
        super()._load_best_model()
        self._renew()

    def _renew(self) -> None:
        if self._spread is not None:
            self._spread.renew_()
