"""The key-value store that all processes share: a notice board, which is lost with the first machine or the way there.

A store that cannot be reached any more says so late or never. So it is asked in a thread, and whoever asks gives up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from hf_blocklocal.parallel.meetings import Meetings


# A notice takes milliseconds. Torch would wait half an hour for one that is never put up.
_PATIENCE = timedelta(seconds=120)


class Board:
    """Puts up notices and reads them.

    Args:
        store: The store.
        lost: Called with what has gone wrong where the store cannot be reached any more; raises an error.
        patience: Seconds that the store may take to answer.
    """

    def __init__(self, store: dist.Store, lost: Callable[[str], NoReturn], *, patience: float) -> None:
        self._store, self._lost, self._patience = store, lost, patience
        self._meetings = Meetings(self._check_patience, self._check_error, torch.device("cpu"))
        self._asked = 0.0
        self._silent = False

    def set(self, key: str, value: str) -> None:
        """Put up a notice."""
        self._ask(self._store.set, key, value)

    def set_first(self, key: str, value: str) -> bytes:
        """Put up a notice where there is none yet, and read the one that is there then: one, whoever asks."""
        return self._ask(self._store.compare_set, key, "", value)

    def get(self, key: str) -> bytes:
        """Read a notice, waiting until it is there."""
        return self._ask(self._store.get, key)

    def has(self, *keys: str) -> bool:
        """Tell whether notices are there, all of them."""
        return self._ask(self._store.check, list(keys))

    def _ask(self, function: Callable[..., bytes | bool | None], *args: str | list[str]) -> bytes | bool | None:
        self._asked = time.monotonic()
        return self._meetings.run(function, *args)

    def _check_patience(self) -> None:
        if self._silent or time.monotonic() > self._asked + self._patience:
            self._silent = True  # whatever else is asked waits behind what has not been answered
            self._lost(f"it has not answered for {self._patience:.0f} s")

    def _check_error(self, error: BaseException) -> None:
        if isinstance(error, dist.DistError):
            self._lost(str(error).splitlines()[0][:200])
