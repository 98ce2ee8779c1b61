"""Give every process what several of them have together: the samples of a batch, sums over blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_blocklocal.parallel.chain import Chain


def gather_samples(chain: Chain, value: Any, gradient_state: Any) -> Any:
    """Put together what the chains have of a batch, without samples that only fill it.

    Args:
        chain: The place of this process.
        value: Tensors with a first dimension of samples, nested in any way, of the same shapes in all chains.
        gradient_state: accelerate's note of whether this is the last batch, and how many samples of it count.
    """
    if isinstance(value, Mapping):
        return type(value)({key: gather_samples(chain, item, gradient_state) for key, item in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(gather_samples(chain, item, gradient_state) for item in value)
    if not isinstance(value, Tensor):
        return value
    if chain.num_replicas > 1:
        parts = [torch.empty_like(value) for _ in range(chain.num_replicas)]
        chain.together(dist.all_gather, parts, value.contiguous(), group=chain.replicas)
        value = torch.cat(parts)
    cut_off = gradient_state.end_of_dataloader and gradient_state.remainder > 0
    return value[: gradient_state.remainder] if cut_off else value


def sum_over_blocks(chain: Chain, values: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes of a chain."""
    values = values.clone()
    chain.together(dist.all_reduce, values, group=chain.blocks)
    return values
