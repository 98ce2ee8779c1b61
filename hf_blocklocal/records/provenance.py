"""Where numbers were made: versions, commit, hardware. Only what can be found out is told."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata

import torch


# Those that are imported only if a run uses them are told only then.
ALWAYS = ("hf-blocklocal", "torch", "transformers", "accelerate")
IF_USED = ("datasets", "peft", "evaluate")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a run depends on."""
    names = [*ALWAYS, *(name for name in IF_USED if name in sys.modules)]
    found = {"Python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from its sources, without having been installed
            continue
    return found


def hardware(processes: int = 1) -> str:
    """Say in a few words what this process computes on, and how many processes there were."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        machine = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    else:
        cores = os.cpu_count()
        machine = f"CPU ({platform.machine()}" + (f", {cores} cores" if cores else "") + ")"
    threads = "" if torch.cuda.is_available() else f", torch on {torch.get_num_threads()} of them"
    return machine + threads + (f", {processes} processes" if processes > 1 else "")


def commit() -> str | None:
    """Return the commit of the git checkout that the process runs in; None if it runs in none."""
    revision = _git("rev-parse", "HEAD")
    if not revision:
        return None
    return revision + (" with uncommitted changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(("git", *arguments), capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a checkout that does not answer
        return None
    return done.stdout.strip() if done.returncode == 0 else None
