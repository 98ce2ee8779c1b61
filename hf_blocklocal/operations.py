"""Count floating-point operations, whoever computes them.

`FlopCounterMode` also tells the modules apart, and for that it hooks into the gradients of all they are given. Under
`torch.no_grad` that fails where an embedding is told to require gradients, as for checkpointing (BART).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    counter.mod_tracker = _OneForAll()
    return counter
