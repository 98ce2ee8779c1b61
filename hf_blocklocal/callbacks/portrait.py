"""What there is to tell of a cut model to somebody who does not have it: plain values, a block at a time."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from hf_blocklocal.assembly import Assembly
from hf_blocklocal.borrowing.shortcut import borrowed_layers
from hf_blocklocal.optim.groups import rates_of_blocks
from hf_blocklocal.records.history import BlockOfCut
from hf_blocklocal.records.memory import name_of
from hf_blocklocal.teaching.describing import block_device, sizes, taught_by
from hf_blocklocal.teaching.overlap import CITATION as OVERLAP
from hf_blocklocal.teaching.polish import is_global


def blocks_of(assembly: Assembly, devices: Mapping[int, str]) -> tuple[BlockOfCut, ...]:
    """Describe each block of a cut model, in forward order.

    Args:
        assembly: The cut model.
        devices: Where each block lies.
    """
    described, rates = [], rates_of_blocks(assembly.cut.num_blocks, assembly.config.block_lr_decay)
    for block, span in enumerate(assembly.cut.spans):
        in_block, in_head = sizes(assembly.parameters, assembly.heads, block)
        described.append(
            BlockOfCut(
                first=span.start if assembly.last > 0 else None,
                last=span.last if assembly.last > 0 else None,
                parameters=in_block,
                head=in_head,
                cost=assembly.head_costs[block] if block < len(assembly.head_costs) else None,
                taught_by=taught_by(assembly.cut, assembly.config, assembly.heads, block),
                device=devices[block],
                rate=rates[block],
            )
        )
    return tuple(described)


def devices_of(assembly: Assembly, *, only: int | None = None) -> dict[int, str]:
    """Return where the blocks lie that are in this process.

    Args:
        assembly: The cut model.
        only: The one block that is here; None if all are.
    """
    blocks = range(assembly.cut.num_blocks) if only is None else [only]
    devices = {block: block_device(assembly.module.model, assembly.cut, block) for block in blocks}
    return {block: "nowhere" if device is None else name_of(device) for block, device in devices.items()}


def citations_of(assembly: Assembly) -> tuple[str, ...]:
    """Return the papers that the losses, feedback networks and readouts of a run name, each once."""
    modules: list[nn.Module] = [module for head in assembly.heads for module in head.modules()]
    named = [citation for module in modules if (citation := getattr(type(module), "citation", None))]
    if assembly.config.overlap > 0:
        named.append(OVERLAP)
    return tuple(dict.fromkeys(named))


def share_of_global_steps(assembly: Assembly, steps: int, max_steps: int) -> float:
    """Return the share of the optimizer steps taken that were backpropagation; 0 with a single block.

    Args:
        assembly: The cut model.
        steps: Steps taken.
        max_steps: Steps of the whole run.
    """
    config = assembly.config
    if assembly.last == 0 or steps == 0 or (config.polish == 0 and config.global_every is None):
        return 0.0
    return sum(is_global(step, max_steps, config) for step in range(steps)) / steps


def reaches_all_layers(assembly: Assembly) -> bool:
    """Tell whether, in local steps too, some loss is sent back through all layers."""
    if assembly.last == 0 or assembly.config.overlap >= assembly.last:
        return True
    above = len(assembly.cut.layers) - assembly.cut.spans[0].stop
    borrowed = borrowed_layers(assembly.cut, 0, assembly.config.head_layers) if assembly.heads[0].borrows else ()
    return len(borrowed) >= above
