"""What processes do together, such as adding up numbers, while one that waits keeps an eye on the others.

A collective that waits for a process that is gone says so late or never, and not who it is. So it runs in a thread of
its own, and the thread that computes looks around until it is done. That thread also stays open to signals. What a GPU
waits for is not done before the GPU has done it: a number that is read afterwards makes nobody wait.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

from hf_blocklocal.crossing import queue_here, settle, working_in


_POLL = 0.1

Result = TypeVar("Result")


class Meetings:
    """Runs what processes do together, one thing at a time.

    Args:
        look_around: Called now and then while others are waited for; raises where waiting is in vain.
        explain: Called with an error of what was run; raises another one where a process that is gone is behind it.
        device: Where this process computes.
    """

    def __init__(
        self, look_around: Callable[[], None], explain: Callable[[BaseException], None], device: torch.device
    ) -> None:
        self._look_around, self._explain, self._device = look_around, explain, device
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Run a function in which other processes are waited for, and return what it returns."""
        if threading.current_thread() is self._thread:
            return function(*args, **kwargs)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="meetings", daemon=True)
            self._thread.start()
        meeting = _Meeting(partial(function, *args, **kwargs), self._device)
        self._tasks.put(meeting.hold)
        while not meeting.over.wait(_POLL):
            self._look_around()
        if meeting.error is not None:
            self._explain(meeting.error)
            raise meeting.error
        return meeting.result

    def _work(self) -> None:
        while True:
            self._tasks.get()()


class _Meeting:
    """Something to be done in the thread as the caller would: in its queue on a GPU, with gradients if it has them."""

    def __init__(self, task: Callable[[], Any], device: torch.device) -> None:
        self.over = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None
        self._task, self._device = task, device
        self._grad, self._queue = torch.is_grad_enabled(), queue_here(device)

    def hold(self) -> None:
        try:
            with torch.set_grad_enabled(self._grad), working_in(self._queue):
                self.result = self._task()
                settle(self._device)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the thread that computes must hear of it
            self.error = error
        self.over.set()
