"""Find out whether all processes, which may be on several machines, see the files that the first one sees."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import torch.distributed as dist

from hf_blocklocal.errors import FolderNotSharedError
from hf_blocklocal.optim.collectives import gather_from_processes
from hf_blocklocal.parallel.chain import Chain


def check_checkpoint_everywhere(chain: Chain, state: Path | None) -> None:
    """Refuse to resume where processes would go on from different checkpoints. All must call it.

    Args:
        chain: The place of this process.
        state: The file that tells one checkpoint from another, where this process would resume from; None if it has
            found no checkpoint.

    Raises:
        FolderNotSharedError: If some find another one than the first process, or none.
    """
    here = None if state is None or not state.is_file() else zlib.crc32(state.read_bytes())
    everywhere = chain.together(gather_from_processes, here, dist.get_world_size())
    others = [rank for rank, there in enumerate(everywhere) if there != everywhere[0]]
    if others:
        found = "none" if state is None else f"what is in {state.parent}"
        raise FolderNotSharedError(
            f"{_listed(chain, others)} would resume from another checkpoint than {chain.peers.names[0]}, or find none "
            f"(here: {found}). Every process reads the whole checkpoint: copy the folder that the first process has "
            "written to the same place on every machine, or let output_dir be a folder that they share."
        )


def check_shared(chain: Chain, folder: Path, why: str) -> None:
    """Refuse a folder in which not all processes find what the first one writes. All must call it.

    Args:
        chain: The place of this process.
        folder: The folder.
        why: What needs it to be shared.

    Raises:
        FolderNotSharedError: If some do not.
    """
    world = dist.get_world_size()
    token = folder / f".{chain.together(gather_from_processes, uuid4().hex, world)[0]}"
    if chain.writes:
        folder.mkdir(parents=True, exist_ok=True)
        token.touch()
    chain.meet()
    seen = chain.together(gather_from_processes, token.is_file(), world)
    if chain.writes:
        token.unlink()
    if not all(seen):
        raise FolderNotSharedError(
            f"{_listed(chain, [rank for rank, sees in enumerate(seen) if not sees])} cannot see what "
            f"{chain.peers.names[0]} writes to {folder}, and {why} lets every process read it there. Let output_dir "
            f"be a folder that all machines share, or leave {why} out."
        )


def _listed(chain: Chain, ranks: Sequence[int]) -> str:
    return ", ".join(chain.peers.names[rank] for rank in ranks)
