"""What a process does when it is told to end: say who is missing, or stop where all processes can stop together.

A launcher tells all processes to end as soon as one has died, often before the others have noticed. Where there are
several launchers, one for each machine, the processes of the others are told by those of the first to hear it.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hf_blocklocal.errors import BlockPeerError
from hf_blocklocal.parallel.chain import Chain


# Chains of a run are within one step of each other, and lower blocks are ahead of upper ones.
_MARGIN = 2


class LeavingAlone:
    """Takes SIGTERM and Ctrl-C while a single process trains, which is to write a checkpoint first.

    A second signal is not waited for. Signals come to the main thread alone.
    """

    def __init__(self) -> None:
        self._told = False
        self._before: dict[int, Callable[..., Any] | int | None] = {}

    @contextmanager
    def in_run(self) -> Iterator[None]:
        """Train inside the `with`."""
        self._told = False
        if threading.current_thread() is threading.main_thread():
            self._before = {sign: signal.signal(sign, self._hear) for sign in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for sign, before in self._before.items():
                signal.signal(sign, before)

    def due(self, _step: int) -> bool:
        """Tell whether the run is to end after the step under way."""
        return self._told

    def _hear(self, sign: int, _frame: FrameType | None) -> None:
        if not self._told:
            self._told = True
            return
        signal.signal(sign, self._before[sign])
        signal.raise_signal(sign)


class Leaving:
    """Takes SIGTERM, and where a checkpoint is to be saved Ctrl-C, while processes work together.

    Signals come to the main thread alone: a run in another thread is not told of them.

    Args:
        chain: The place of this process.
        save: Whether to stop at a step that all processes agree on, so that a checkpoint can be written there.
    """

    def __init__(self, chain: Chain, *, save: bool) -> None:
        self._chain, self._save = chain, save
        self._told = self._in_run = False
        self._before: dict[int, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> Leaving:
        if threading.current_thread() is not threading.main_thread():
            return self
        # A launcher that is stopped by Ctrl-C passes on just that.
        for sign in (signal.SIGTERM, signal.SIGINT) if self._save else (signal.SIGTERM,):
            self._before[sign] = signal.signal(sign, self._hear)
        return self

    def __exit__(self, *_: Any) -> None:
        for sign, before in self._before.items():
            signal.signal(sign, before)

    @contextmanager
    def in_run(self) -> Iterator[None]:
        """Train inside the `with`: there is a step to stop at."""
        self._in_run = True
        try:
            yield
        finally:
            self._in_run = False

    def due(self, step: int) -> bool:
        """Tell whether the run is to end after an optimizer step.

        Args:
            step: Optimizer steps taken so far.
        """
        if not self._save or not self._chain.peers.told_to_stop:
            return False
        last = self._chain.peers.stop_at(step + _MARGIN, decides=self._chain.writes)
        return last is not None and step >= last

    def _hear(self, sign: int, frame: FrameType | None) -> None:
        peers = self._chain.peers
        try:
            peers.look_for_missing()
            if self._save and self._in_run and not self._told:
                self._told = True
                peers.tell_to_stop()
                return
        except BlockPeerError as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        signal.signal(sign, self._before[sign])
        signal.raise_signal(sign)
