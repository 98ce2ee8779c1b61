"""Decide how far the target leaks into what a block hands on: posterior bootstrapping, and its way to zero.

Arithmetic on steps. How a hidden state is moved is not decided here.
"""

from __future__ import annotations

from hf_blocklocal.config.block_local import BlockLocalConfig


def bootstrap_weight(step: int, total_steps: int, config: BlockLocalConfig) -> float:
    """Return lambda, the weight of the backward message in what blocks hand on in a step.

    It falls linearly from `bootstrap` at the first step to 0, and the last step of a run never has any.

    Args:
        step: Optimizer steps before this one.
        total_steps: Optimizer steps of the run.
        config: Where it starts, and at which share of the run it ends.
    """
    end = min(config.bootstrap_until * total_steps, total_steps - 1)
    return config.bootstrap * (1 - step / end) if step < end else 0.0
