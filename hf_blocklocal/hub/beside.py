"""Pushes that are made beside training: they never stop it, and what fails is told once and sent again later."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo

from hf_blocklocal.errors import NotPushableError
from hf_blocklocal.hub.failures import cause_of
from hf_blocklocal.hub.files import checkpoint_files, run_files, stage
from hf_blocklocal.hub.push import Destination, Patience, in_background, send


logger = logging.getLogger(__name__)


class PushesBeside:
    """Sends checkpoints one after another in a thread.

    A push that fails is not tried again by itself: that of the next checkpoint takes its place, and takes along the
    checkpoints that are still missing on the Hub.

    Args:
        patience: How long one push may take.
    """

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self._pool: ThreadPool | None = None
        self._given_up = threading.Event()
        self._under_way: dict[Future[CommitInfo], float] = {}
        self._unsent: dict[str, Path] = {}
        self._told: set[str] = set()

    @property
    def is_busy(self) -> bool:
        """Whether a push is under way."""
        self._sort_out()
        return bool(self._under_way)

    def keep(self, checkpoint: Path, place: str) -> None:
        """Remember a checkpoint to be sent with the next push, whole, in place of an earlier one in that place."""
        self._unsent[place] = checkpoint

    def push(
        self, checkpoint: Path, notes: Mapping[str, Path], destination: Destination, *, message: str, folder: Path
    ) -> None:
        """Send the model of a checkpoint, what lies beside it, and the checkpoints that are to be kept.

        Args:
            checkpoint: Folder of the checkpoint.
            notes: Further files by their paths in the repository.
            destination: Where to.
            message: First line of the commit.
            folder: Where files are put aside for as long as it takes.
        """
        places = {place: path for place, path in dict(self._unsent).items() if path.is_dir()}
        try:
            files = {**notes, **run_files(checkpoint)}
            for place, path in places.items():
                files |= checkpoint_files(path, place)
            aside = TemporaryDirectory(dir=folder, prefix="_push-", ignore_cleanup_errors=True)
            staged = stage(files, Path(aside.name))
        except (OSError, NotPushableError) as error:  # a full disk, say
            self._tell(type(error).__name__, str(error).rstrip("."))
            return

        given_up = self._given_up

        def work() -> CommitInfo:
            with aside:
                return send(staged, destination, message=message, silence=self.patience.silence, given_up=given_up)

        future = self.start(work, seconds=self.patience.limit_for(files))
        future.add_done_callback(partial(self._ended, places=places, given_up=given_up))

    def start(self, work: Callable[[], CommitInfo], *, seconds: float) -> Future[CommitInfo]:
        """Start a push, after those under way; what becomes of it is the caller's to see.

        Args:
            work: Makes the push.
            seconds: How long it may take.
        """
        if self._pool is None:
            self._pool = ThreadPool(1)
        latest = max(self._under_way.values(), default=time.monotonic())
        future = in_background(work, self._pool)
        self._under_way[future] = latest + seconds
        return future

    def finish(self) -> None:
        """Wait for the pushes under way, but not for ever."""
        if self.is_busy:
            logger.info("Waiting for the push under way.")
            wait(self._under_way, max(self._under_way.values()) - time.monotonic())
            self._sort_out()
        self._close()

    def _close(self) -> None:
        """Let the thread go once it is done."""
        if self._pool is not None:
            self._pool.close()
        self._pool, self._given_up, self._under_way = None, threading.Event(), {}

    def _sort_out(self) -> None:
        """Forget pushes that have ended, and leave to themselves all of a thread that takes longer than it may."""
        now = time.monotonic()
        self._under_way = {future: until for future, until in self._under_way.items() if not future.done()}
        if any(until <= now for until in self._under_way.values()):
            self._tell("silence", "the Hub does not come to an end")
            self._given_up.set()
            self._close()

    def _ended(self, future: Future[CommitInfo], *, places: Mapping[str, Path], given_up: threading.Event) -> None:
        error = future.exception()
        if given_up.is_set():
            return
        if error is not None:
            cause = cause_of(error)
            self._tell(cause.name, cause.text)
            return
        self._told.clear()
        for place, path in places.items():
            if self._unsent.get(place) == path:
                del self._unsent[place]

    def _tell(self, name: str, text: str) -> None:
        """Warn of a failure, once for each cause until a push goes well."""
        if name not in self._told:
            self._told.add(name)
            logger.warning("A push beside training failed: %s. Training goes on; the next push sends it again.", text)
