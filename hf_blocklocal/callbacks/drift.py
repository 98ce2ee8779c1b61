"""How far each block has gone from the weights that training started with."""

from __future__ import annotations

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
    that trains nothing, or only weights that start from zero, has no row.

    Args:
        trainer: The `BlockLocalTrainer` to look at.
        every: Optimizer steps from one look to the next.
    """

    def __init__(self, trainer: Trainer, *, every: int = 50) -> None:
        super().__init__(trainer, every=every)
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
        blocks = enumerate(self.trainer.assembly.parameters)
        block_of = {id(parameter): block for block, parameters in blocks for parameter in parameters}
        squares = {block: [0.0, 0.0] for block in sorted(set(block_of.values()))}
        for name, parameter in self.trainer.model.named_parameters():
            if name in self._start:
                start = self._start[name].float()
                moved, length = squares[block_of[id(parameter)]], start.square().sum().item()
                moved[0] += (parameter.detach().cpu().float() - start).square().sum().item()
                moved[1] += length
        return {
            f"drift/block_{block}": (distance / length) ** 0.5
            for block, (distance, length) in squares.items()
            if length > 0
        }

    def _copies(self) -> dict[str, Tensor]:
        parameters = self.trainer.model.named_parameters()
        return {name: torch.clone(p.detach()).cpu() for name, p in parameters if p.requires_grad}
