"""From the name of a folder or of a repository to a folder: what is on the Hub is downloaded, once."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from hf_blocklocal.checkpoint import FILES
from hf_blocklocal.errors import FetchError
from hf_blocklocal.hub.failures import FAILURES, cause_of
from hf_blocklocal.hub.push import answers_within


_SILENCE = 30.0


def fetch(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    patterns: Sequence[str] = FILES,
) -> Path:
    """Return the folder itself, or one with files of a repository on the Hub.

    Args:
        source: A folder, or the name of a repository such as `"user/model"`.
        revision: Branch, tag or commit of the repository.
        token: A token that may read it; None takes that of `hf auth login` or HF_TOKEN.
        patterns: Files of the repository to download; by default `block_local_config.json` and the heads.

    Raises:
        FetchError: If it is neither, cannot be read, or has none of the files.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise FetchError(f"{source} is a folder, which has no revision {revision!r}. Leave the revision out.")
        return Path(source)
    repo = _checked(source)
    try:
        with answers_within(_SILENCE):
            folder = Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=list(patterns)))
    except FAILURES as error:
        raise FetchError(f"{repo} could not be fetched from the Hub: {_reason(error)}.") from error
    if not any(any(folder.glob(pattern)) for pattern in patterns):
        at = "" if revision is None else f" at revision {revision}"
        raise FetchError(f"{repo}{at} on the Hub holds none of {', '.join(patterns)}.")
    return folder


def fetch_checkpoint(source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None) -> Path:
    """Return the folder itself, or one with the newest checkpoint that a run has pushed.

    Args:
        source: A folder, or the name of a repository.
        revision: Branch, tag or commit of the repository.
        token: A token that may read it.

    Raises:
        FetchError: If it is neither, cannot be read, or holds no checkpoint.
    """
    if Path(source).is_dir():
        return fetch(source, revision=revision)
    repo = _checked(source)
    try:
        with answers_within(_SILENCE):
            names = HfApi(token=token).list_repo_files(repo, revision=revision)
    except FAILURES as error:
        raise FetchError(f"{repo} could not be fetched from the Hub: {_reason(error)}.") from error
    found = [re.fullmatch(r"(last-checkpoint|checkpoint-(\d+))/trainer_state\.json", name) for name in names]
    places = {int(match[2] or -1): match[1] for match in found if match}
    if not places:
        raise FetchError(
            f"{repo} on the Hub holds no checkpoint to go on from. Runs push theirs with hub_strategy='checkpoint' or "
            "'all_checkpoints'; of others, only the trained model is there."
        )
    place = places[-1] if -1 in places else places[max(places)]
    return fetch(repo, revision=revision, token=token, patterns=[f"{place}/*"]) / place


def _checked(source: str | os.PathLike[str]) -> str:
    try:
        validate_repo_id(os.fspath(source))
    except HFValidationError as error:
        raise FetchError(f"{source} is no folder, and it cannot be a repository: {error}") from None
    return os.fspath(source)


def _reason(error: BaseException) -> str:
    if isinstance(error, RepositoryNotFoundError):
        return (
            "there is no such repository (and no such folder here), or it is private and the token, if any, may not "
            "see it; log in with `hf auth login`, set HF_TOKEN, or pass a token"
        )
    if isinstance(error, LocalEntryNotFoundError):
        return f"the Hub cannot be reached, and it was never downloaded before ({cause_of(error).text})"
    return cause_of(error).text
