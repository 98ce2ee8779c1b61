"""Count floating-point operations, whoever computes them.

Torch's own counter leaves out the products of experts, each of which has rows of its own. And it tells modules apart:
for that it hooks into the gradients of all they are given, which fails under `torch.no_grad` where an embedding is to
require gradients, as for checkpointing (BART).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


class _OneForAll:
    """Stands in for torch's tracker of modules: all operations belong to the whole."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _OneForAll:
        return self

    def __exit__(self, *args: object) -> None:
        """Leave nothing behind."""


def operation_counter(formulas: Mapping[Any, Any] | None = None) -> FlopCounterMode:
    """Return a context that counts; ask it for `get_total_flops()`.

    Args:
        formulas: Operations that torch's own counter does not know, with the function that counts each.
    """
    known = {torch.ops.aten._grouped_mm: _products_of_groups, **(formulas or {})}
    counter = FlopCounterMode(display=False, custom_mapping=known)
    counter.mod_tracker = _OneForAll()
    return counter


def _products_of_groups(first: Sequence[int], second: Sequence[int], *_: Any, **__: Any) -> int:
    """Count products of groups that share out a dimension; one that is not shared out comes first in both shapes."""
    groups = first[0] if len(first) == len(second) == 3 else 1
    return 2 * groups * first[-2] * first[-1] * second[-1]
