"""Know whether the processes that hold the other blocks are alive, and what has become of one that is not.

Every process says twice a second that it is alive, and where it is; one that fails says why before it goes. Whoever
waits for a message looks there, so that the first sentence a user reads names a rank, a block and a cause, not a port.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence

import torch.distributed as dist

from hf_blocklocal.errors import BlockPeerError


_BEAT = 0.5
# How long the report of a process whose connection has broken may take to arrive.
_LAST_WORDS = 3.0
# How long to wait for signs of life when a process may be gone: several beats, on a busy machine.
_NOTICING = 5.0
# Seconds from one look at the signs of life of all to the next, so that many processes do not crowd the store.
_LOOK = 1.0


class Peers:
    """What this process says of itself to the others, and hears of them.

    Args:
        store: Key-value store that all processes share.
        rank: This process.
        names: What each process is called in messages, by rank.
        timeout: Seconds without a sign of life after which a process counts as lost.
    """

    def __init__(self, store: dist.Store, *, rank: int, names: Sequence[str], timeout: float) -> None:
        self.step = 0
        self._store, self._rank, self._names, self._timeout = store, rank, names, timeout
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._looked = 0.0
        self._stopped = threading.Event()
        self._beats = threading.Thread(target=self._beat, args=(store.clone(),), name="sign of life", daemon=True)
        self._beats.start()

    def report(self, error: BaseException) -> None:
        """Leave word of why this process fails, unless it fails because of another one."""
        if not isinstance(error, BlockPeerError):
            said = {"rank": self._rank, "step": self.step, "error": f"{type(error).__name__}: {error}"[:2000]}
            self._store.set(f"failed/{self._rank}", json.dumps(said))
            self._store.set("failed", str(self._rank))

    def look_for_missing(self) -> None:
        """Wait for a sign of life of every process.

        Raises:
            BlockPeerError: If one has failed or does not give any.
        """
        before = [self._sign(rank) for rank in range(len(self._names))]
        until = time.monotonic() + _NOTICING
        while time.monotonic() < until:
            self._look_for_failures()
            if all(self._sign(rank) != sign for rank, sign in enumerate(before)):
                return
            time.sleep(0.1)
        rank = next(rank for rank, sign in enumerate(before) if self._sign(rank) == sign)
        self._give_up(rank, f"is gone; {self._where(rank)}")

    def agree_to_stop(self, step: int, *, decides: bool, waiting: Callable[[], None]) -> int:
        """Return the step after which all processes stop.

        Args:
            step: Where this process could stop.
            decides: Whether what it says counts.
            waiting: Called while another process has not decided yet.
        """
        if decides and not self._store.check(["stop"]):
            self._store.set("stop", str(step))
        while not self._store.check(["stop"]):
            waiting()
            time.sleep(0.1)
        return int(self._store.get("stop"))

    def stop(self) -> None:
        """Say no more, and wait for what is being said: an interpreter that ends in the middle of it is aborted."""
        self._stopped.set()
        self._beats.join(_LAST_WORDS)

    def check(self, peer: int, broken: BaseException | None = None) -> None:
        """Raise if waiting for a process is in vain.

        Args:
            peer: Its rank.
            broken: What the connection to it has said, if it is broken.

        Raises:
            BlockPeerError: If any process has reported a failure, or this one is gone or has shown no sign of life
                for too long.
        """
        deadline = time.monotonic() + (_LAST_WORDS if broken is not None else 0)
        while True:
            self._look_for_failures()
            if time.monotonic() >= deadline:
                break
            time.sleep(0.1)
        if broken is not None:
            self._give_up(peer, f"is gone; {self._where(peer)} ({str(broken).splitlines()[0][:200]})")
        self._check_sign(peer)

    def check_all(self) -> None:
        """Raise if waiting for all processes together is in vain.

        Raises:
            BlockPeerError: If any process has reported a failure, or has shown no sign of life for too long.
        """
        self._look_for_failures()
        if time.monotonic() < self._looked + _LOOK:
            return
        for rank in range(len(self._names)):
            if rank != self._rank:
                self._check_sign(rank)
        self._looked = time.monotonic()

    def _check_sign(self, rank: int) -> None:
        silent = self._silent_for(rank)
        if silent > self._timeout:
            self._give_up(rank, f"has shown no sign of life for {silent:.0f} s; {self._where(rank)}")

    def _look_for_failures(self) -> None:
        if not self._store.check(["failed"]):
            return
        for rank in range(len(self._names)):
            if self._store.check([f"failed/{rank}"]):
                said = json.loads(self._store.get(f"failed/{rank}"))
                self._give_up(rank, f"failed at step {said['step']}: {said['error']}")

    def _give_up(self, rank: int, what: str) -> None:
        raise BlockPeerError(
            f"{self._names[rank]} {what}. {self._names[self._rank]} was at step {self.step} and cannot go on without "
            "it. Resume with trainer.train(resume_from_checkpoint=True)."
        )

    def _where(self, rank: int) -> str:
        sign = self._sign(rank)
        return f"last heard of at step {sign.decode().split()[0]}" if sign else "it was never heard of"

    def _sign(self, rank: int) -> bytes:
        return self._store.get(f"alive/{rank}") if self._store.check([f"alive/{rank}"]) else b""

    def _silent_for(self, rank: int) -> float:
        """Return for how many seconds, on this process's clock, another one has shown no sign of life."""
        sign, now = self._sign(rank), time.monotonic()
        if rank not in self._seen or self._seen[rank][0] != sign:
            self._seen[rank] = (sign, now)
        return now - self._seen[rank][1]

    def _beat(self, store: dist.Store) -> None:
        count = 0
        while not self._stopped.wait(_BEAT):
            count += 1
            store.set(f"alive/{self._rank}", f"{self.step} {count}")
