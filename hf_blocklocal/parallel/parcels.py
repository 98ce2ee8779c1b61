"""Bytes of which only the sender knows how many they are, from one process to another."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hf_blocklocal.parallel.chain import Chain


def send_bytes(content: Tensor, rank: int, group: dist.ProcessGroup) -> None:
    """Send bytes, and first how many they are."""
    dist.send(torch.tensor([len(content)]), rank, group=group)
    dist.send(content, rank, group=group)


def receive_bytes(rank: int, group: dist.ProcessGroup) -> Tensor:
    """Return bytes that another process sends, of which only that one knows how many they are."""
    length = torch.empty(1, dtype=torch.int64)
    dist.recv(length, rank, group=group)
    content = torch.empty(int(length), dtype=torch.uint8)
    dist.recv(content, rank, group=group)
    return content


def gathered_from_chains(chain: Chain, content: bytes) -> list[bytes]:
    """Return what the first processes of all chains have, in the one that writes checkpoints; nothing in the others.

    Args:
        chain: The place of this process, which is the first of its chain.
        content: What it has.
    """
    assert chain.block == 0, "the other processes of a chain have nothing to say"
    if chain.writes:
        others = range(chain.num_blocks, chain.num_replicas * chain.num_blocks, chain.num_blocks)
        return [content, *(bytes(chain.together(receive_bytes, rank, chain.control).numpy()) for rank in others)]
    chain.together(send_bytes, torch.frombuffer(bytearray(content), dtype=torch.uint8), 0, chain.control)
    return []
