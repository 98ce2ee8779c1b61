"""How far each block has gone from the weights that training started with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_blocklocal.callbacks.base import BlockCallback


class DriftCallback(BlockCallback):
    """Logs `drift/block_k`: `||w - w0|| / ||w0||` over the weights of block k, its head left out.

    `w0` are the weights that are trainable when training starts, so with adapters it is the adapters that are
    measured. A run that is resumed is measured from the weights that the model had when the callback was made, which
    in a script are the pretrained ones again. Copies are held on the CPU, in the precision of the weights. A block
    that trains nothing, or only weights that start from zero, has no row. Where every block has a process of its own,
    each looks at what it has of its block, and all add up.

    Args:
        trainer: The `BlockLocalTrainer` to look at.
        every: Optimizer steps from one look to the next.
    """

    def __init__(self, trainer: Trainer, *, every: int = 50) -> None:
        super().__init__(trainer, every=every)
        self.all_look = trainer.block_local.block_parallel_size > 1
        self._start = self._copies()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember where a new run starts."""
        if state.global_step == 0:
            self._start = self._copies()
        super().on_train_begin(args, state, control, **kwargs)

    def measure(self) -> dict[str, float]:
        """Return the relative distance of each block."""
        blocks, chain = self.trainer.assembly.parameters, self.trainer._chain
        mine = range(len(blocks)) if chain is None else [chain.block]
        block_of = {id(parameter): block for block in mine for parameter in blocks[block]}
        whole = torch.zeros(len(blocks), 2, dtype=torch.float64, device=self.trainer.args.device)
        parts = torch.zeros_like(whole)
        for name, parameter, here in self._here():
            block = block_of.get(id(here))
            if block is not None and name in self._start:
                start = self._start[name].float()
                moved = (here.detach().cpu().float() - start).square().sum().item()
                squares = parts if here is not parameter else whole
                squares[block] += squares.new_tensor([moved, start.square().sum().item()])
        total = self.trainer._sum_over_blocks(whole + self.trainer._sum_of_parts(parts))
        return {
            f"drift/block_{block}": (distance / length) ** 0.5
            for block, (distance, length) in enumerate(total.tolist())
            if length > 0
        }

    def _here(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, parameter and what is here of it, for the trainable ones of this process."""
        for name, parameter in self.trainer.model.named_parameters():
            if parameter.requires_grad and not parameter.is_meta:
                yield name, parameter, self.trainer._parts.get(parameter, parameter)

    def _copies(self) -> dict[str, Tensor]:
        return {name: torch.clone(here.detach()).cpu() for name, _, here in self._here()}
