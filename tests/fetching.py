"""Tensors that are made when they are asked for, and how many of them are there at once."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import Tensor


class Fetch:
    """Returns copies of tensors by name.

    Attributes:
        most: How many copies have been there at once.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = 0

    def __call__(self, name: str) -> Tensor:
        """Make one more."""
        copy = self._tensors[name].clone()
        self._alive.add(copy)
        self.most = max(self.most, len(self._alive))
        return copy
