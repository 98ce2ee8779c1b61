"""Push the folder of a run to the Hub, as one commit, and go on trying as long as that can help.

The run is on disk before, and stays there: whatever fails ends in one `PushError` that says how to finish later.
"""

from __future__ import annotations

import itertools
import logging
import os
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import get_session, validate_repo_id

from hf_blocklocal.card import name_location
from hf_blocklocal.errors import NotPushableError, PushError
from hf_blocklocal.hub.failures import FAILURES, cause_of
from hf_blocklocal.hub.files import run_files


logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Below this size, these travel in the commit itself.
_TEXTS = (".json", ".jsonl", ".md", ".txt", ".jinja", ".py")
_SMALL = 1_000_000


@dataclass(frozen=True)
class Destination:
    """Where on the Hub a run goes.

    Attributes:
        repo: Name of a model repository, made if need be; with or without the namespace.
        token: A token that may write; None takes that of `hf auth login` or HF_TOKEN.
        private: Whether a new repository is private; None leaves that to the Hub.
        revision: Branch, made if need be; None is the main one.
    """

    repo: str
    token: str | None = field(default=None, repr=False)
    private: bool | None = None
    revision: str | None = None

    def command(self, folder: str | os.PathLike[str]) -> str:
        """Return the command that pushes a folder here later. It holds no token, since logs are shared."""
        words = ["hf-blocklocal", "push", str(Path(folder).resolve()), self.repo]
        words += ["--private"] if self.private else []
        words += ["--revision", self.revision] if self.revision is not None else []
        return shlex.join(words)


@dataclass(frozen=True)
class Patience:
    """How long a push goes on trying.

    Attributes:
        attempts: How often it is tried.
        first_wait: Seconds before the second attempt, doubled before each further one, unless the Hub names a time.
        silence: Seconds without a byte from the Hub before it counts as hung.
        limit: Seconds for everything, to which the time of a slow connection is added.
        bytes_per_second: A slow connection.

    Raises:
        NotPushableError: If a value is impossible.
    """

    attempts: int = 6
    first_wait: float = 2.0
    silence: float = 30.0
    limit: float = 300.0
    bytes_per_second: float = 1e6

    def __post_init__(self) -> None:
        for name, least in {"attempts": 1, "first_wait": 0}.items():
            if getattr(self, name) < least:
                raise NotPushableError(f"{name} must be at least {least}, got {getattr(self, name)!r}.")
        for name in ("silence", "limit", "bytes_per_second"):
            if not getattr(self, name) > 0:
                raise NotPushableError(f"{name} must be a number above 0, got {getattr(self, name)!r}.")

    def limit_for(self, files: Mapping[str, Path]) -> float:
        """Return the seconds within which these files are sent, or the push is given up."""
        return self.limit + sum(file.stat().st_size for file in files.values()) / self.bytes_per_second

    def wait_after(self, attempt: int) -> float:
        """Return the seconds to wait after an attempt, counted from 1."""
        return self.first_wait * 2 ** (attempt - 1)


def check_destination(destination: Destination) -> None:
    """Refuse, without asking the Hub, what it would refuse.

    Raises:
        NotPushableError: If the name is impossible or there is no token.
    """
    try:
        validate_repo_id(destination.repo)
    except HFValidationError as error:
        raise NotPushableError(f"{destination.repo!r} cannot be the name of a repository. {error}") from None
    if not (destination.token or get_token()):
        raise NotPushableError(
            f"Pushing to {destination.repo} needs a token that may write, and there is none. Log in with "
            "`hf auth login`, set HF_TOKEN, or pass a token."
        )


@contextmanager
def answers_within(seconds: float) -> Iterator[None]:
    """Let requests to the Hub fail after so many seconds of silence, where the client would wait for ever."""
    session = get_session()
    before, session.timeout = session.timeout, seconds
    try:
        yield
    finally:
        session.timeout = before


def announce(destination: Destination, *, silence: float) -> str:
    """Make the repository, if it is not there yet, and return its full name.

    Args:
        destination: Where.
        silence: Seconds without an answer before this fails.
    """
    with answers_within(silence):
        return (
            HfApi(token=destination.token)
            .create_repo(destination.repo, private=destination.private, exist_ok=True)
            .repo_id
        )


def send(
    files: Mapping[str, Path],
    destination: Destination,
    *,
    message: str,
    silence: float,
    given_up: threading.Event | None = None,
) -> CommitInfo:
    """Send files once, as a single commit: all of them arrive, or none.

    Large files go one by one, because the client sends several in threads that would keep the process from ending.

    Args:
        files: Paths on disk by their paths in the repository.
        destination: Where to.
        message: First line of the commit.
        silence: Seconds without an answer before this fails.
        given_up: Set when nobody waits for this any more; then nothing is committed, so that it cannot undo what has
            been pushed since.
    """
    repo = announce(destination, silence=silence)
    api, revision = HfApi(token=destination.token), destination.revision
    if revision is not None and not revision.startswith("refs/"):
        with answers_within(silence):
            api.create_branch(repo, branch=revision, exist_ok=True)
    additions = [CommitOperationAdd(name, file) for name, file in files.items()]
    for addition in additions:
        if _may_be_large(Path(addition.path_or_fileobj)):
            # Anew for each, because the client makes itself a new session after a failure.
            with answers_within(silence):
                api.preupload_lfs_files(repo, [addition], revision=revision)
    if given_up is not None and given_up.is_set():
        raise PushError(f"{destination.repo} took longer than there was time.")
    with answers_within(silence):
        return api.create_commit(repo, additions, commit_message=message, revision=revision)


def _may_be_large(file: Path) -> bool:
    return file.suffix not in _TEXTS or file.stat().st_size > _SMALL


def push_run(
    folder: str | os.PathLike[str],
    destination: Destination,
    *,
    message: str = "End of training",
    patience: Patience | None = None,
) -> CommitInfo:
    """Push the folder of a run: model, tokenizer, config, heads, card, history and figures, whatever is there.

    The quick start of the card, where it says to load the model from its folder, is made to name the repository.

    Args:
        folder: Where `save_model()` has written.
        destination: Where to.
        message: First line of the commit.
        patience: How long to go on trying.

    Raises:
        NotPushableError: If the folder is no run, or name or token will not do.
        PushError: If the Hub cannot be brought to take it.
    """
    patience = Patience() if patience is None else patience
    files = run_files(folder)
    check_destination(destination)
    if "/" in destination.repo:
        name_location(folder, destination.repo)
    logger.info("The run is saved in %s; pushing it to %s.", folder, destination.repo)
    given_up = threading.Event()
    attempts = _Attempts(Path(folder), destination, patience, deadline=time.monotonic() + patience.limit_for(files))
    try:
        return attempts.make(
            lambda: send(files, destination, message=message, silence=patience.silence, given_up=given_up)
        )
    finally:
        given_up.set()


@dataclass(frozen=True)
class _Attempts:
    """Attempts at one push, up to a time on the clock."""

    folder: Path
    destination: Destination
    patience: Patience
    deadline: float

    def make(self, work: Callable[[], Result]) -> Result:
        """Return what the first attempt that goes well returns."""
        with closing(ThreadPool(1)) as pool:
            for attempt in itertools.count(1):
                future = in_background(work, pool)
                if not wait([future], max(0.0, self.deadline - time.monotonic())).done:
                    raise self._given_up("the Hub does not come to an end", attempt)
                try:
                    return future.result()
                except FAILURES as error:
                    self._wait_or_give_up(error, attempt)
        raise AssertionError("attempts never run out by themselves")

    def _wait_or_give_up(self, error: Exception, attempt: int) -> None:
        cause = cause_of(error)
        seconds = self.patience.wait_after(attempt) if cause.wait is None else cause.wait
        is_late = time.monotonic() + seconds > self.deadline
        if not cause.passes or attempt >= self.patience.attempts or is_late:
            raise self._given_up(cause.text, attempt) from error
        logger.warning(
            "Pushing to %s failed: %s. The run is safe in %s. Trying again in %.0f s (attempt %d of %d).",
            self.destination.repo,
            cause.text,
            self.folder,
            seconds,
            attempt + 1,
            self.patience.attempts,
        )
        time.sleep(seconds)

    def _given_up(self, reason: str, attempts: int) -> PushError:
        times = "once" if attempts == 1 else f"{attempts} times"
        return PushError(
            f"The run was not pushed to {self.destination.repo}, tried {times}: {reason}. Nothing is lost: it is "
            f"saved in {self.folder}. To finish the push later, run: {self.destination.command(self.folder)}"
        )


def in_background(work: Callable[[], Result], pool: ThreadPool) -> Future[Result]:
    """Start work in a thread that does not keep the process from ending, as those of an executor would."""
    future: Future[Result] = Future()
    pool.apply_async(work, callback=future.set_result, error_callback=future.set_exception)
    return future
