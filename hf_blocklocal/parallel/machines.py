"""How processes that may be on several machines find each other: who has come, under what name, and within reach."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from hf_blocklocal.errors import BlockPeerError


# As long as torch waits for anything; a process may have data to prepare before it comes.
_ARRIVAL = timedelta(minutes=30)
_GREETING = timedelta(minutes=5)


def machine_here() -> str:
    """Return what this machine is called: its number at the launcher, if that has told, and its name."""
    number = os.environ.get("GROUP_RANK")  # of torchrun, and so of accelerate launch
    name = socket.gethostname()
    return name if number is None else f"machine {number}, {name}"


def machines_of_all(store: dist.Store) -> list[str]:
    """Wait until all processes have come, and return the machine of each, by rank. All must call it.

    Raises:
        BlockPeerError: If some do not come.
    """
    rank, keys = dist.get_rank(), [f"machine/{rank}" for rank in range(dist.get_world_size())]
    store.set(keys[rank], machine_here())
    try:
        store.wait(keys, _ARRIVAL)
    except dist.DistError as error:
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        raise BlockPeerError(
            f"Rank {', '.join(missing)} of {len(keys)} has not made its trainer within {_ARRIVAL.seconds // 60} "
            f"minutes after rank {rank} on {machine_here()}. Look at what it has printed; data that take long to "
            "prepare are best prepared before the launch."
        ) from error
    return [store.get(key).decode() for key in keys]


def names_of(machines: Sequence[str], num_blocks: int) -> list[str]:
    """Return what each process is called in messages, by rank, with its machine where there are several.

    Args:
        machines: The machine of each process.
        num_blocks: Processes of a chain.
    """
    several = len(set(machines)) > 1
    places = [f" on {machine}" if several else "" for machine in machines]
    return [f"Block {rank % num_blocks} (rank {rank}{place})" for rank, place in enumerate(places)]


def check_reachable() -> None:
    """Let all processes connect to each other, before they do so with all the patience there is. All must call it.

    Raises:
        BlockPeerError: If they cannot.
    """
    try:
        # It stays: whoever closed it could cut off one that is still connecting.
        dist.new_group(backend="gloo", timeout=_GREETING)
    except RuntimeError as error:
        raise BlockPeerError(
            f"Rank {dist.get_rank()} on {machine_here()} cannot connect to all processes: "
            f"{str(error).splitlines()[0][:300]}. Gloo takes the address that the name of a machine leads to. Where "
            "that is not the network between the machines, set GLOO_SOCKET_IFNAME on each to its interface there, "
            "such as eth0."
        ) from error
