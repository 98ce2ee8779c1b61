"""How far the gradient that each block learns from points where backpropagation would have it go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_blocklocal.anatomy.lending import taken_by
from hf_blocklocal.callbacks.base import BlockCallback, check_whole_model_here, collated, undisturbed
from hf_blocklocal.errors import TargetError, UnsupportedSettingError
from hf_blocklocal.teaching.loss_scale import custom_loss
from hf_blocklocal.teaching.report import StepReport


Gradients = list[list[Tensor | None]]
"""For each block, a gradient for each of its trainable parameters, None where it gets none."""


class GradientAlignmentCallback(BlockCallback):
    """Logs, on one fixed batch, the cosine between a block's local gradient and that of backpropagation.

    `alignment/block_k` is the cosine over the trainable weights of block k, its head left out; `norm_ratio/block_k`
    is the length of the local gradient over that of the other. Both losses are the trainer's means over the batch,
    without dropout. The last block learns from the model's own loss and has 1 by definition; a little less where it
    owns a weight that is used further down too, such as a tied embedding. With `head_layers` at all layers above,
    every block has 1. A block without a gradient has no row, and with a single block there is nothing to compare.

    A look costs a local step and a backward pass through the whole model, with its memory for activations.
    `.grad` fields, modes and random streams are left as they were.

    Args:
        trainer: The `BlockLocalTrainer` to look at.
        batch: A collated batch with labels. Default: as many examples of the training set as a batch has, evenly
            spread over it.
        every: Optimizer steps from one look to the next.

    Raises:
        TargetError: If no label of the batch counts; when training starts.
        UnsupportedSettingError: With `overlap`, where a gradient has no single block that it comes from; and where
            every block has a process of its own.
    """

    def __init__(self, trainer: Trainer, batch: Mapping[str, Any] | None = None, *, every: int = 50) -> None:
        super().__init__(trainer, every=every)
        check_whole_model_here(self)
        self.batch = batch
        overlap = trainer.block_local.overlap
        if overlap > 0:
            raise UnsupportedSettingError(
                f"GradientAlignmentCallback and overlap={overlap} exclude each other: it compares the gradient of one "
                "loss per block, and with overlap several losses reach a block. Leave one of the two out."
            )

    def measure(self) -> dict[str, float]:
        """Return cosine and ratio of norms for each block that gets a gradient."""
        if self.trainer.assembly.last == 0:
            return {}
        if self.batch is None:
            size = self.trainer.args.per_device_train_batch_size
            self.batch = collated(self.trainer, self.trainer.train_dataset, samples=size, batch_size=size)[0]
        inputs = self.trainer._prepare_inputs(dict(self.batch))
        parameters = block_parameters(self.trainer.assembly.module.model, self.trainer.assembly.parameters)
        with undisturbed(self.trainer.assembly.module), torch.enable_grad():
            local = self._local_gradients(inputs, parameters)
            true = self._true_gradients(inputs, parameters)
        seen = {}
        for block, (mine, theirs) in enumerate(zip(local, true, strict=True)):
            norm, true_norm = _dot(mine, mine) ** 0.5, _dot(theirs, theirs) ** 0.5
            if norm > 0 and true_norm > 0:
                seen[f"alignment/block_{block}"] = _dot(mine, theirs) / (norm * true_norm)
                seen[f"norm_ratio/block_{block}"] = norm / true_norm
        return seen

    def _local_gradients(self, inputs: dict[str, Any], parameters: list[list[nn.Parameter]]) -> Gradients:
        """Run one local step that catches the gradients on their way to the parameters."""
        assembly = self.trainer.assembly
        targets = assembly.read_targets(inputs)
        if len(targets) == 0:
            raise TargetError("No label of the batch to look at counts. Pass another batch to the callback.")
        caught: Gradients = [[None] * len(block) for block in parameters]

        def backward(loss: Tensor) -> None:
            # All blocks, because a loss may reach more than its own.
            for number, gradients in enumerate(_gradients(loss, parameters)):
                caught[number] = [_sum(old, new) for old, new in zip(caught[number], gradients, strict=True)]

        def learned(block: int, report: StepReport) -> None:
            """Nothing is stepped."""

        lesson = assembly.step.teach(
            targets,
            scale=1 / targets.elements,
            backward=backward,
            learned=learned,
            inputs=taken_by(self.trainer.model, inputs),
            custom_loss=custom_loss(self.trainer.compute_loss_func, inputs["labels"], targets, None, processes=1),
        )
        with lesson:
            backward(self.trainer.compute_loss(self.trainer.model, dict(inputs)))
        return caught

    def _true_gradients(self, inputs: dict[str, Any], parameters: list[list[nn.Parameter]]) -> Gradients:
        return _gradients(self.trainer.compute_loss(self.trainer.model, dict(inputs)), parameters)


def block_parameters(model: nn.Module, parameters: Sequence[Sequence[nn.Parameter]]) -> list[list[nn.Parameter]]:
    """Return the trainable parameters of each block that belong to the model, which leaves out those of heads."""
    in_model = {id(parameter) for parameter in model.parameters()}
    return [[p for p in block if id(p) in in_model and p.requires_grad] for block in parameters]


def _gradients(loss: Tensor, parameters: list[list[nn.Parameter]]) -> Gradients:
    """Return the gradients of a loss without touching `.grad`; None for what cannot be or is not reached."""
    reachable = [p for block in parameters for p in block if p.requires_grad]
    found = torch.autograd.grad(loss, reachable, allow_unused=True)
    by_parameter = {id(p): gradient for p, gradient in zip(reachable, found, strict=True)}
    return [[by_parameter.get(id(p)) for p in block] for block in parameters]


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _dot(first: list[Tensor | None], second: list[Tensor | None]) -> float:
    terms = [
        torch.dot(a.flatten().float(), b.flatten().float()).cpu()
        for a, b in zip(first, second, strict=True)
        if a is not None and b is not None
    ]
    return torch.stack(terms).double().sum().item() if terms else 0.0
