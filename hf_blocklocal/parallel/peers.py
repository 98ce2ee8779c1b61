"""Know whether the processes that hold the other blocks are alive, and what has become of one that is not.

Every process says twice a second that it is alive, and where it is; one that fails says why before it goes. Whoever
waits for a message looks there, so that the first sentence a user reads names a rank, a block and a cause, not a port.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import torch.distributed as dist

from hf_blocklocal.errors import BlockPeerError
from hf_blocklocal.parallel.board import Board


_BEAT = 0.5
# How long the report of a process whose connection has broken may take to arrive.
_LAST_WORDS = 3.0
# How long to wait for signs of life when a process may be gone: several beats, on a busy machine.
_NOTICING = 5.0
# Seconds from one look at the signs of life of all to the next, so that many processes do not crowd the store.
_LOOK = 1.0
# Under this name stands which process has failed or is missed, and how: the first that was named, for all.
_CAUSE = "failed"


class Peers:
    """What this process says of itself to the others, and hears of them.

    Args:
        store: Key-value store that all processes share.
        rank: This process.
        names: What each process is called in messages, by rank.
        timeout: Seconds without a sign of life after which a process counts as lost.

    Attributes:
        names: What each process is called in messages, by rank.
        step: Optimizer steps that this process has taken; it says so with every sign of life.
        told_to_stop: Whether this process has heard that all are to stop.
    """

    def __init__(self, store: dist.Store, *, rank: int, names: Sequence[str], timeout: float) -> None:
        self.step = 0
        self.told_to_stop = False
        self._board = Board(store, self._lose_board, patience=timeout)
        self.names = tuple(names)
        self._rank, self._timeout = rank, timeout
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._looked = 0.0
        self._stopped = threading.Event()
        board = Board(store.clone(), self._lose_board, patience=timeout)
        self._beats = threading.Thread(target=self._beat, args=(board,), name="sign of life", daemon=True)
        self._beats.start()

    def report(self, error: BaseException) -> None:
        """Leave word of why this process fails, unless it fails because of another one."""
        if not isinstance(error, BlockPeerError):
            said = f"failed at step {self.step}: {type(error).__name__}: {error}"[:2000]
            with suppress(BlockPeerError):  # what has happened here is what its user is to read
                self._name_cause(self._rank, said)

    def look_for_missing(self) -> None:
        """Wait for a sign of life of every process.

        Raises:
            BlockPeerError: If one has failed or does not give any.
        """
        before = [self._sign(rank) for rank in range(len(self.names))]
        until = time.monotonic() + _NOTICING
        while time.monotonic() < until:
            self._look_for_failures()
            if all(self._sign(rank) != sign for rank, sign in enumerate(before)):
                return
            time.sleep(0.1)
        rank = next(rank for rank, sign in enumerate(before) if self._sign(rank) == sign)
        self._miss(rank, f"is gone; {self._where(rank)}")

    def tell_to_stop(self) -> None:
        """Pass on to all processes, those of other machines too, that they are to stop."""
        self._board.set("stop", "please")
        self._hear_to_stop(self._board)

    def stop_at(self, step: int, *, decides: bool) -> int | None:
        """Return the step after which all processes stop, once every one of them has heard that they are to.

        Nobody waits for it: one that stood still would keep others from coming as far as that step.

        Args:
            step: Where this process could stop.
            decides: Whether what it says counts.
        """
        heard = (f"told/{rank}" for rank in range(len(self.names)))
        if decides and not self._board.has("stop_at") and self._board.has(*heard):
            self._board.set("stop_at", str(step))
        return int(self._board.get("stop_at")) if self._board.has("stop_at") else None

    def _hear_to_stop(self, board: Board) -> None:
        self.told_to_stop = True  # first, as others rely on what the notice says
        board.set(f"told/{self._rank}", "yes")

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
            self._miss(peer, f"is gone; {self._where(peer)} ({str(broken).splitlines()[0][:200]})")
        self._check_sign(peer)

    def check_all(self) -> None:
        """Raise if waiting for all processes together is in vain.

        Raises:
            BlockPeerError: If any process has reported a failure, or has shown no sign of life for too long.
        """
        self._look_for_failures()
        if time.monotonic() < self._looked + _LOOK:
            return
        for rank in range(len(self.names)):
            if rank != self._rank:
                self._check_sign(rank)
        self._looked = time.monotonic()

    def _check_sign(self, rank: int) -> None:
        silent = self._silent_for(rank)
        if silent > self._timeout:
            self._miss(rank, f"has shown no sign of life for {silent:.0f} s; {self._where(rank)}")

    def _look_for_failures(self) -> None:
        if self._board.has(_CAUSE):
            self._give_up(*json.loads(self._board.get(_CAUSE)))

    def _miss(self, rank: int, what: str) -> NoReturn:
        """Give up because of a process that leaves no word itself, or of the one that was named before it."""
        self._give_up(*self._name_cause(rank, what))

    def _name_cause(self, rank: int, what: str) -> tuple[int, str]:
        """Name the process that all end because of, and return the one that was named first.

        Of a machine that is lost, each neighbour misses another process; and one that ends because of another is not
        to be taken for the cause.
        """
        first, why = json.loads(self._board.set_first(_CAUSE, json.dumps([rank, what])))
        return first, why

    def _give_up(self, rank: int, what: str) -> NoReturn:
        raise BlockPeerError(
            f"{self.names[rank]} {what}. {self.names[self._rank]} was at step {self.step} and cannot go on without "
            "it. Resume with trainer.train(resume_from_checkpoint=True)."
        )

    def _lose_board(self, what: str) -> NoReturn:
        raise BlockPeerError(
            "The launcher of the first machine, which keeps the key-value store of the run, is gone or cannot be "
            f"reached ({what}). {self.names[self._rank]} was at step {self.step} and cannot go on without it. Resume "
            "with trainer.train(resume_from_checkpoint=True)."
        )

    def _where(self, rank: int) -> str:
        sign = self._sign(rank)
        return f"last heard of at step {sign.decode().split()[0]}" if sign else "it was never heard of"

    def _sign(self, rank: int) -> bytes:
        return self._board.get(f"alive/{rank}") if self._board.has(f"alive/{rank}") else b""

    def _silent_for(self, rank: int) -> float:
        """Return for how many seconds, on this process's clock, another one has shown no sign of life."""
        sign, now = self._sign(rank), time.monotonic()
        if rank not in self._seen or self._seen[rank][0] != sign:
            self._seen[rank] = (sign, now)
        return now - self._seen[rank][1]

    def _beat(self, board: Board) -> None:
        count = 0
        with suppress(BlockPeerError):  # the thread that computes will find out, and says so
            while count == 0 or not self._stopped.wait(_BEAT):  # the first at once: a run may be short
                count += 1
                board.set(f"alive/{self._rank}", f"{self.step} {count}")
                if not self.told_to_stop and board.has("stop"):
                    self._hear_to_stop(board)
