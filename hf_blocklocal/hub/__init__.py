"""The Hub: what of a run goes there, how it gets there whatever fails on the way, and how it comes back."""

from __future__ import annotations

from hf_blocklocal.hub.beside import PushesBeside
from hf_blocklocal.hub.failures import FAILURES, cause_of
from hf_blocklocal.hub.fetch import fetch, fetch_checkpoint
from hf_blocklocal.hub.files import run_files
from hf_blocklocal.hub.push import Destination, Patience, announce, answers_within, check_destination, push_run


__all__ = [
    "FAILURES",
    "Destination",
    "Patience",
    "PushesBeside",
    "announce",
    "answers_within",
    "cause_of",
    "check_destination",
    "fetch",
    "fetch_checkpoint",
    "push_run",
    "run_files",
]
