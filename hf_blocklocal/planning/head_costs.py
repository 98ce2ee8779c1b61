"""Count what the head of a block costs beside its block, in floating-point operations of a training step.

Matrix products and convolutions count, as `FlopCounterMode` has it; element-wise operations do not. What a head does
once per step, whatever the size of the batch, does not count either: the batch that is counted is a small one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_blocklocal.anatomy.modes import evaluation_mode, outputs_not_recorded
from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.feedback import FeedbackHead
from hf_blocklocal.records.operations import operation_counter
from hf_blocklocal.targets.batch import Targets
from hf_blocklocal.teaching.step import LocalStep


logger = logging.getLogger(__name__)

# What training the blocks apart can gain is spent by heads that cost more than this share of their block.
LIGHT = 0.1
# A backward pass computes two products for each one of the forward pass: for the weights, and for the input.
FORWARD_AND_BACKWARD = 3


def head_costs(
    model: nn.Module, step: LocalStep, layer_costs: Sequence[float], inputs: Mapping[str, Any], targets: Targets
) -> tuple[float, ...]:
    """Return the operations of each head as a share of those of its block.

    Borrowed layers count with their forward pass and the half of the backward pass that goes to their input.

    Args:
        model: The model.
        step: Its local step.
        layer_costs: Operations of the forward pass of each layer.
        inputs: The batch that these have been counted with.
        targets: Its targets.
    """
    spans = step.boundaries.cut.spans
    in_blocks = [FORWARD_AND_BACKWARD * sum(layer_costs[span.start : span.stop]) for span in spans]
    in_heads = head_operations(model, step, inputs, targets)
    return tuple(head / block if block > 0 else 0.0 for head, block in zip(in_heads, in_blocks[:-1], strict=True))


def head_operations(model: nn.Module, step: LocalStep, inputs: Mapping[str, Any], targets: Targets) -> list[int]:
    """Count the operations of every head, forward and backward, that grow with the batch; it may hold no gradient."""
    counts: list[int] = []

    def leave(block: int, hidden: Tensor, _router_logits: tuple[Tensor, ...]) -> None:
        head, leaf = step.heads[block], hidden.detach().requires_grad_()
        with torch.enable_grad(), outputs_not_recorded(), step.borrowing(block, heads_only=True):
            with operation_counter() as counter:
                loss = head(step.seen_by_head(block, leaf, inputs, targets), targets).sum()
                if head.reconstruction is not None:
                    loss = loss + head.reconstruction(leaf, step.inlets[block].hidden, targets)
                loss.backward()
            counts.append(counter.get_total_flops() - _once_per_step(head, targets))
            head.zero_grad()

    with (
        evaluation_mode(model),
        evaluation_mode(step.heads),
        torch.no_grad(),
        step.watched(),
        step.boundaries.attached(leave),
    ):
        model(**inputs)
    return counts


def _once_per_step(head: FeedbackHead, targets: Targets) -> int:
    """Count the operations of the messages of all possible targets."""
    with operation_counter() as counter:
        messages_CZ = head.feedback(targets)
        if messages_CZ is not None and messages_CZ.requires_grad:
            messages_CZ.sum().backward()
    return counter.get_total_flops()


def _lighter(config: BlockLocalConfig) -> str:
    """Say what of a configuration would make heads lighter, beside another cut."""
    if config.borrows and config.head_bypass == "straight_through":
        return ", and so does head_bypass='skip'"
    if config.head_layers:
        return f", and so do fewer head_layers than {config.head_layers}" if config.head_layers > 1 else ""
    learns = config.feedback in ("direct", "chained")
    return f", and so does a latent_dim below {config.latent_dim}" if learns else ""


def warn_of_heavy_heads(costs: Sequence[float], config: BlockLocalConfig) -> None:
    """Say which heads cost more than a tenth of their block, and what would make them lighter.

    Args:
        costs: What `head_costs` has returned.
        config: How the model is cut and taught, with nothing left open about its heads.
    """
    heavy = [f"{block} ({cost:.0%})" for block, cost in enumerate(costs) if cost > LIGHT]
    if heavy:
        logger.warning(
            "The heads of these blocks cost more than %.0f%% of the operations of their block: %s. Fewer and larger "
            "blocks make them lighter%s.",
            100 * LIGHT,
            ", ".join(heavy),
            _lighter(config),
        )
