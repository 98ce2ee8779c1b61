"""The cut of a model as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hf_blocklocal.blocks import Cut
from hf_blocklocal.config import BlockLocalConfig
from hf_blocklocal.feedback import FeedbackHead
from hf_blocklocal.shortcut import borrowed_layers


def table_of_blocks(
    cut: Cut,
    config: BlockLocalConfig,
    parameters: Sequence[Sequence[nn.Parameter]],
    heads: Sequence[FeedbackHead],
    costs: Sequence[float],
) -> str:
    """Return a table: block, layers, parameters of block and head, cost of the head, what teaches it.

    Args:
        cut: Where the model is cut.
        config: How it is taught, with nothing left open.
        parameters: The parameters of each block and its head.
        heads: The head of every block but the last.
        costs: The share of each head in the operations of its block; empty if it is not known.
    """
    rows = [("block", "layers", "parameters", "head", "cost", "taught by")]
    for block, span in enumerate(cut.spans):
        head = heads[block] if block < cut.num_blocks - 1 else None
        in_head = 0 if head is None else sum(parameter.numel() for parameter in head.parameters())
        in_block = sum(parameter.numel() for parameter in parameters[block]) - in_head
        taught = "the model's own loss"
        if head is not None:
            taught = f"{type(head.feedback).__name__}, {type(head.loss).__name__} ({head.loss.family.name})"
            if head.borrows:
                layers_above = borrowed_layers(cut, block, config.head_layers)
                through = ["a lens"] if head.lens is not None else []
                through += [f"layers {', '.join(map(str, layers_above))}"] if layers_above else []
                taught += f" through {' and '.join(through)}"
        layers = f"{span.start}-{span.last}" if cut.num_blocks - 1 > 0 else "all"
        rows.append((str(block), layers, f"{in_block:,}", f"{in_head:,}", _cost_of_head(costs, block), taught))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _cost_of_head(costs: Sequence[float], block: int) -> str:
    if block >= len(costs):
        return ""
    return "<1%" if costs[block] < 0.01 else f"{costs[block]:.0%}"
