"""The key-value store that all processes share: a notice board, which is lost with the first machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist


# A notice takes milliseconds. Torch would wait half an hour for one that is never put up.
_PATIENCE = timedelta(seconds=120)


class Board:
    """Puts up notices and reads them.

    Args:
        store: The store.
        lost: Called with the error where the store cannot be reached any more; raises another one.
    """

    def __init__(self, store: dist.Store, lost: Callable[[dist.DistError], NoReturn]) -> None:
        self._store, self._lost = store, lost

    def set(self, key: str, value: str) -> None:
        """Put up a notice."""
        with self._reached():
            self._store.set(key, value)

    def get(self, key: str) -> bytes:
        """Read a notice, waiting until it is there."""
        with self._reached():
            return self._store.get(key)

    def has(self, *keys: str) -> bool:
        """Tell whether notices are there, all of them."""
        with self._reached():
            return self._store.check(list(keys))

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            self._lost(error)


def said_by_all(store: dist.Store, rank: int, world: int, what: str, said: str) -> Sequence[str]:
    """Put up what this process has to say, and return what all have said, by rank."""
    store.set(f"{what}/{rank}", said)
    store.wait([f"{what}/{other}" for other in range(world)], _PATIENCE)
    return [store.get(f"{what}/{other}").decode() for other in range(world)]
