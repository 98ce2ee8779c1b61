"""What processes of a chain say of a batch, so that those which have read different ones find out."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


# Numbers of a tensor that are looked at. Large tensors, such as those of images, are sampled.
_LOOKED_AT = 4096


def facts_of(inputs: Mapping[str, Any], where: tuple[int | str, ...]) -> dict[str, Any]:
    """Return shape and checksum of every tensor of a batch, JSON-able.

    A checksum is over all numbers of a small tensor, and over evenly spread ones of a large one: the same batch always
    gives the same, and two that differ in a few numbers of many may.

    Args:
        inputs: The batch.
        where: Its place in the run.
    """
    tensors = {name: value for name, value in sorted(inputs.items()) if isinstance(value, Tensor)}
    samples = [_sample(tensor) for tensor in tensors.values()]
    if not samples:
        return {"where": list(where), "batch": []}
    # All at once, because every copy from a GPU waits for it.
    content = torch.cat([sample.to(samples[0].device) for sample in samples]).cpu().numpy()
    told, start = [], 0
    for (name, tensor), sample in zip(tensors.items(), samples, strict=True):
        told.append([name, list(tensor.shape), zlib.crc32(content[start : start + len(sample)])])
        start += len(sample)
    return {"where": list(where), "batch": told}


def described(facts: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return in words what one process says of its batch where another one says something else."""
    batch, elsewhere = facts["batch"], other["batch"]
    differing = [told for told in batch if told not in elsewhere] or batch
    tensors = ", ".join(f"{name} {shape} with checksum {number:08x}" for name, shape, number in differing)
    return f"at {' '.join(map(str, facts['where']))} a batch of {tensors or 'no tensors'}"


def _sample(tensor: Tensor) -> Tensor:
    """Return the bytes of evenly spread numbers."""
    flat = tensor.detach().reshape(-1)
    # An odd stride, so that it does not stay in one column of a row.
    stride = 1 if len(flat) <= _LOOKED_AT else len(flat) // _LOOKED_AT | 1
    return flat[::stride].contiguous().view(torch.uint8)
