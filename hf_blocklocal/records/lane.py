"""When one process worked and when it waited: the last few steps, for a picture of all processes side by side.

Plain arithmetic on moments in time. Nothing here knows processes or figures.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

from hf_blocklocal.records.history import Timeline


Stretch = tuple[float, float]
# The last steps that are kept; a figure shows fewer.
STEPS = 8
# Waiting that is shorter, in seconds, is no more than a queue being looked into.
SHORTEST = 1e-3


def work_between(start: float, stop: float, waits: Iterable[Stretch]) -> list[Stretch]:
    """Return the stretches between two moments that lie outside all waiting.

    Args:
        start: The first moment.
        stop: The second.
        waits: Beginning and end of each time of waiting, in any order, of any time.
    """
    stretches, begun = [], start
    for wait_start, wait_stop in sorted(waits):
        if wait_stop <= begun or wait_start >= stop or wait_stop - wait_start < SHORTEST:
            continue
        if wait_start > begun:
            stretches.append((begun, wait_start))
        begun = wait_stop
    return [*stretches, (begun, stop)] if begun < stop else stretches


class Lane:
    """Notes the steps of one block.

    Args:
        block: The block.
        waits: Returns beginning and end of each time of waiting so far, as far as they are remembered.
        now: The clock.
    """

    def __init__(
        self, block: int, waits: Callable[[], Iterable[Stretch]], *, now: Callable[[], float] = time.time
    ) -> None:
        self._block, self._waits, self._now = block, waits, now
        self._began = now()
        self._rows: deque[list[Timeline]] = deque(maxlen=STEPS)

    def begin(self) -> None:
        """Note that a step begins."""
        self._began = self._now()

    def end(self, step: int) -> None:
        """Note that a step is done."""
        stretches = work_between(self._began, self._now(), self._waits())
        self._rows.append([Timeline(step, self._block, *stretch) for stretch in stretches])

    def rows(self, ahead: float = 0.0) -> list[Timeline]:
        """Return the stretches of work in the last steps.

        Args:
            ahead: By how many seconds the clock to tell them by is ahead of this one.
        """
        return [replace(row, start=row.start + ahead, stop=row.stop + ahead) for rows in self._rows for row in rows]
