"""Look whether a GPU has queues enough for all that a block's process hands to it at the same time."""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed as dist

from hf_blocklocal.errors import UnsupportedSettingError


logger = logging.getLogger(__name__)

_DEFAULT = 8


def check_queues(device: torch.device, num_blocks: int) -> None:
    """Refuse a GPU with a single queue, in which a message would stand behind an average that waits for it.

    Messages up, weights down and averages have a stream each, and NCCL one more. With three blocks and more those can
    be more than the eight queues that CUDA has if nothing is said, so that some would share one: a warning says so.

    Raises:
        UnsupportedSettingError: If the environment asks for one.
    """
    queues = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    if device.type != "cuda":
        return
    if queues == "1":
        raise UnsupportedSettingError(
            "CUDA_DEVICE_MAX_CONNECTIONS=1 and a block per process exclude each other: messages travel while a block "
            "computes, which takes a queue of their own on the GPU. Set it to 32, or with two blocks leave it out."
        )
    if num_blocks > 2 and dist.get_backend() == "nccl" and int(queues or _DEFAULT) <= _DEFAULT:
        logger.warning(
            "With %d blocks, a GPU may have more streams than its %s queues, and a message that shares a queue waits "
            "for what is before it. Start with CUDA_DEVICE_MAX_CONNECTIONS=32 in the environment.",
            num_blocks,
            queues or _DEFAULT,
        )
