"""Decide which optimizer steps are global: backpropagation through the whole model, from its own loss alone.

Arithmetic on steps. What a global step costs: it keeps the activations of all blocks, as ordinary training does.
"""

from __future__ import annotations

from hf_blocklocal.config.block_local import BlockLocalConfig


def is_global(step: int, total_steps: int, config: BlockLocalConfig) -> bool:
    """Tell whether a step is global: every n-th one, and those of the last phase, but none while heads warm up.

    Args:
        step: Optimizer steps before this one.
        total_steps: Optimizer steps of the run.
        config: How many are asked for. A share of the run above 0 is at least one step.
    """
    if step < config.head_warmup_steps:
        return False
    if config.global_every is not None and (step + 1) % config.global_every == 0:
        return True
    if config.polish == 0:
        return False
    return step >= total_steps - max(1, round(config.polish * total_steps))
