"""The cut of a model as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hf_blocklocal.borrowing.shortcut import borrowed_layers, learns_past_layers
from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.cut.blocks import Cut
from hf_blocklocal.feedback import FeedbackHead
from hf_blocklocal.optim.groups import rates_of_blocks
from hf_blocklocal.records.history import ALL_ABOVE, BORROWED, STRAIGHT_PAST, TRAINED_COPIES


def table_of_blocks(
    model: nn.Module,
    cut: Cut,
    config: BlockLocalConfig,
    parameters: Sequence[Sequence[nn.Parameter]],
    heads: Sequence[FeedbackHead],
    costs: Sequence[float],
) -> str:
    """Return a table: block, its device if there are several, layers, parameters, cost of the head, what teaches it.

    Where blocks learn at several rates, these are in it too, as shares of the run's.

    Args:
        model: The model.
        cut: Where the model is cut.
        config: How it is taught, with nothing left open.
        parameters: The parameters of each block and its head.
        heads: The head of every block but the last.
        costs: The share of each head in the operations of its block; empty if it is not known.
    """
    rows = [("block", "layers", "parameters", "head", "cost", "taught by")]
    for block, span in enumerate(cut.spans):
        in_block, in_head = sizes(parameters, heads, block)
        layers = f"{span.start}-{span.last}" if cut.num_blocks - 1 > 0 else "all"
        cost, taught = _cost_of_head(costs, block), taught_by(cut, config, heads, block)
        rows.append((str(block), layers, f"{in_block:,}", f"{in_head:,}", cost, taught))
    if config.block_lr_decay not in (None, 1.0):
        rates = ["rate", *(f"{rate:.2f}" for rate in rates_of_blocks(cut.num_blocks, config.block_lr_decay))]
        rows = [(*row[:5], rate, row[5]) for row, rate in zip(rows, rates, strict=True)]
    if config.placement == "devices":
        devices = ["device", *(str(block_device(model, cut, block)) for block in range(cut.num_blocks))]
        rows = [(row[0], device, *row[1:]) for row, device in zip(rows, devices, strict=True)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def block_device(model: nn.Module, cut: Cut, block: int) -> torch.device | None:
    """Return the device that the layers of a block lie on; None if they have no weights."""
    span = cut.spans[block]
    layers = [model.get_submodule(path) for path in cut.layers[span.start : span.stop]] or [model]
    return next((parameter.device for layer in layers for parameter in layer.parameters()), None)


def sizes(parameters: Sequence[Sequence[nn.Parameter]], heads: Sequence[FeedbackHead], block: int) -> tuple[int, int]:
    """Return the parameters of a block, and those of its head, without its copies of what other blocks have."""
    head = heads[block] if block < len(heads) else None
    in_head = 0 if head is None else sum(parameter.numel() for parameter in head.parameters())
    in_copies = 0 if head is None or head.loan is None else sum(copy.numel() for copy in head.loan.parameters())
    return sum(parameter.numel() for parameter in parameters[block]) - in_head, in_head - in_copies


def taught_by(cut: Cut, config: BlockLocalConfig, heads: Sequence[FeedbackHead], block: int) -> str:
    """Say in a few words what a block learns from."""
    if block >= len(heads):
        return "the model's own loss"
    head = heads[block]
    taught = f"{type(head.feedback).__name__}, {type(head.loss).__name__} ({head.loss.family.name})"
    if head.borrows:
        layers_above = borrowed_layers(cut, block, config.head_layers)
        through = ["a lens"] if head.lens is not None else []
        own = TRAINED_COPIES if head.loan is not None else ""
        if layers_above or own:
            named = f"{BORROWED}{', '.join(map(str, layers_above))}" if layers_above else "the task head"
            borrows_all = len(layers_above) == len(cut.layers) - cut.spans[block].stop
            through.append(own + named + (ALL_ABOVE if borrows_all else ""))
        taught += f" through {' and '.join(through)}"
        if learns_past_layers(cut, block, config):
            taught += f", {STRAIGHT_PAST}"
    return taught


def _cost_of_head(costs: Sequence[float], block: int) -> str:
    if block >= len(costs):
        return ""
    return "<1%" if costs[block] < 0.01 else f"{costs[block]:.0%}"
