"""On which machine a process is, as far as its launcher and the machine say, and what it is called in messages."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence


def machine_here() -> str:
    """Return what this machine is called: its number at the launcher, if that has told, and its name."""
    number = os.environ.get("GROUP_RANK")  # of torchrun, and so of accelerate launch
    name = socket.gethostname()
    return name if number is None else f"machine {number}, {name}"


def names_of(machines: Sequence[str], num_blocks: int) -> list[str]:
    """Return what each process is called in messages, by rank, with its machine where there are several.

    Args:
        machines: The machine of each process.
        num_blocks: Processes of a chain.
    """
    several = len(set(machines)) > 1
    places = [f" on {machine}" if several else "" for machine in machines]
    return [f"Block {rank % num_blocks} (rank {rank}{place})" for rank, place in enumerate(places)]
