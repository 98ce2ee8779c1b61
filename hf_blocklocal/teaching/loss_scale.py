"""Scale what the heads learn from as `Trainer` scales the model's own loss."""

# Shapes: B batch, C classes, N targets.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_blocklocal.crossing import sent
from hf_blocklocal.targets.batch import Targets


def loss_scale(
    targets: Targets, num_items_in_batch: Any, *, processes: int, accumulation_steps: int
) -> Tensor | float:
    """Return what a block's summed loss is multiplied with.

    Args:
        targets: Targets of the micro-batch.
        num_items_in_batch: What the Trainer has counted in the whole batch, None if nothing.
        processes: Over how many processes it has counted.
        accumulation_steps: Micro-batches of the optimizer step.
    """
    if num_items_in_batch is None:
        return 1 / (targets.elements * accumulation_steps)
    return processes / num_items_in_batch


def custom_loss(
    function: Callable[..., Tensor] | None,
    labels: Tensor,
    targets: Targets,
    num_items_in_batch: Any,
    *,
    processes: int,
) -> Callable[[Tensor], Tensor] | None:
    """Return a `compute_loss_func` as a function of a head's logits; None if there is none.

    Args:
        function: The user's loss.
        labels: Labels of the micro-batch, as the user made them.
        targets: Its targets.
        num_items_in_batch: What the Trainer has counted in the whole batch, None if nothing.
        processes: Over how many processes it has counted.
    """
    if function is None:
        return None
    labels = labels[targets.samples_N]
    scale = processes if num_items_in_batch is not None else 1

    def loss(logits_BC: Tensor) -> Tensor:
        outputs = SequenceClassifierOutput(logits=logits_BC)
        labels_here = sent(labels, logits_BC.device)
        return scale * function(outputs, labels_here, num_items_in_batch=num_items_in_batch)

    return loss
