"""How the trainer scales losses for fp16: each block by itself, and saved as one process with all of them would."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from transformers.trainer import SCALER_NAME

from hf_blocklocal.optim.scaler import BlockScaler, check_leaves_out, state_of_all
from hf_blocklocal.parallel.gathering import gathered_at_first
from hf_blocklocal.trainer.spreading import SpreadsBlocks


class ScalesBlocks(SpreadsBlocks):
    """Puts a scaler of several blocks in the place of accelerate's. With a single block, that one stays."""

    @property
    def _scaler(self) -> BlockScaler | None:
        scaler = self.accelerator.scaler
        return scaler if isinstance(scaler, BlockScaler) else None

    def _scale_per_block(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale the losses of the blocks that are here, before accelerate prepares the optimizer."""
        scaler = self.accelerator.scaler
        if scaler is None or not scaler.is_enabled() or self.assembly.last == 0:
            return
        if self._spread is not None:
            check_leaves_out(optimizer)
        if self._scaler is None:
            waits, add_up = self._spread is None, None if self._sharded is None else self._sharded.sum
            self.accelerator.scaler = BlockScaler(scaler, at_work=self._block_at_work, waits=waits, add_up=add_up)
        first = 0 if self._chain is None else self._chain.block
        self._scaler.begin_(dict(enumerate(self._blocks_here, first)), coupled=self.assembly.couples)

    def _block_at_work(self) -> int:
        block = self.assembly.step.at_work
        return self.assembly.last if block is None else block

    def _unscale(self) -> None:
        """Divide gradients by what losses were multiplied with; a block that has overflowed has none after."""
        if self._scaler is None:
            self.accelerator.unscale_gradients()
        else:
            self._scaler.unscale_()

    def _settled(self, block: int, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """Unscale the gradients of one block, to be stepped at once inside the `with`."""
        if self._scaler is None:
            return nullcontext()
        self._scaler.settle_(block)
        return self._scaler.left_out_if_lost(block, optimizer)

    def _save_scaler(self, output_dir: str) -> None:
        """Write what one process would have written."""
        if self._chain is None or self._scaler is None:
            super()._save_scaler(output_dir)
            return
        with gathered_at_first(self._chain, {}, self._scaler.state_dict()["blocks"]) as gathered:
            if self._chain.writes:
                torch.save(state_of_all(gathered.said), Path(output_dir) / SCALER_NAME)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Read the scales where losses are scaled; without fp16, a run goes on from one that had it."""
        if self.accelerator.scaler is not None:
            super()._load_scaler(checkpoint)
