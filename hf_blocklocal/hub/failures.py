"""What a failure of the Hub means: one line for people, and whether to try again, and when."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx


# All that the client raises when something is wrong with the Hub or the way there. A refused connection is no OSError,
# and answers that are no JSON, or not the expected one, come as ValueError, LookupError or TypeError.
FAILURES = (httpx.HTTPError, OSError, RuntimeError, ValueError, LookupError, TypeError)

_PASSING = {408, 409, 412, 425, 429}
_LOG_IN = "Log in with `hf auth login`, set HF_TOKEN, or pass a token"


@dataclass(frozen=True)
class Cause:
    """Why a push failed.

    Attributes:
        name: The same for failures that have the same reason.
        text: One line for people, without a full stop.
        passes: Whether trying again may help.
        wait: Seconds that the Hub asks to wait; None if it does not say.
    """

    name: str
    text: str
    passes: bool
    wait: float | None = None


def cause_of(error: BaseException) -> Cause:
    """Say what an error of the client means."""
    for link in _chain(error):
        if isinstance(link, OfflineModeIsEnabled):
            return Cause("offline", "offline mode is on; unset HF_HUB_OFFLINE", passes=False)
        if isinstance(link, RevisionNotFoundError):
            return Cause("revision", f"it has no such revision ({_line(link)})", passes=False)
        if isinstance(link, HfHubHTTPError) and getattr(link, "response", None) is not None:
            return _of_answer(link)
        if "xet-write-token" in str(link) and "404" in str(link):
            return Cause("xet", "this Hub does not know xet; set HF_HUB_DISABLE_XET=1", passes=False)
        if isinstance(link, httpx.TimeoutException):
            return Cause("silence", "the Hub does not answer", passes=True)
        if isinstance(link, httpx.HTTPError | ConnectionError):
            return Cause(type(link).__name__, f"the Hub cannot be reached ({_line(link)})", passes=True)
        if isinstance(link, json.JSONDecodeError):
            return Cause("no JSON", "the Hub answered with something that is not JSON", passes=True)
    # A transfer that failed inside hf_xet says no more than RuntimeError.
    passes = isinstance(error, RuntimeError)
    return Cause(type(error).__name__, f"{type(error).__name__}: {_line(error)}", passes)


def _of_answer(error: HfHubHTTPError) -> Cause:
    status = error.response.status_code
    name, said = str(status), error.server_message or _line(error)
    if isinstance(error, RepositoryNotFoundError):
        # Deleted meanwhile, perhaps: the next attempt makes it anew.
        return Cause(name, f"there is no such repository, or this token may not see it ({status})", passes=True)
    if status == 401:
        return Cause(name, f"the token was not accepted (401: {said}). {_LOG_IN}", passes=False)
    if status == 403:
        return Cause(name, f"this token may not do that (403: {said})", passes=False)
    passes = status in _PASSING or status >= 500
    wait = _retry_after(error.response.headers) if passes else None
    text = f"the Hub answered {status}" if _is_page(said) else f"the Hub answered {status}: {said}"
    return Cause(name, text if wait is None else f"{text}, try again in {wait:.0f} s", passes, wait)


def _chain(error: BaseException | None) -> list[BaseException]:
    """Return an error and what it came from: a failed upload of one file is wrapped in a RuntimeError."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _retry_after(headers: Mapping[str, str]) -> float | None:
    value = headers.get("Retry-After", "").strip()
    if not value:
        return None
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _is_page(text: str) -> bool:
    return "<" in text


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
