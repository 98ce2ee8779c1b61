"""Random streams that depend on what is computed, not on which process computes it.

Every block draws its dropout from a stream of its own, seeded from the run, the step, the micro-batch and the block.
So a block sees the same masks in one process with the others and in one of its own, and the stream that data loading
draws from goes on as if no block had drawn anything.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RandomState:
    """Where torch's random streams stood, on the CPU and on the device of a tensor."""

    cpu: Tensor
    device: torch.device
    on_device: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """Note where they stand."""
        return cls(torch.get_rng_state(), device, torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def set(self) -> None:
        """Put them there again."""
        torch.set_rng_state(self.cpu)
        if self.on_device is not None:
            torch.cuda.set_rng_state(self.on_device, self.device)


@contextmanager
def stream_per_block(
    exits: Mapping[int, nn.Module],
    seed: tuple[int, ...],
    devices: Sequence[torch.device],
    *,
    paused: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Give every block its own random stream in the forward pass that runs inside the `with`.

    Args:
        exits: The last layer of blocks. Where one has returned, the stream of the next block begins: what runs between
            two blocks, such as the last norm of an encoder, belongs to the upper one.
        seed: What the streams are made from, for example run, step and micro-batch.
        devices: Where the model draws.
        paused: Whether a layer that returns now has run for another purpose, and leaves the stream alone.
    """
    before = [RandomState.now(device) for device in devices]
    # `torch.manual_seed` seeds GPUs too, and where those are not in use takes time to write down who has called it.
    on_cpu = all(device.type == "cpu" for device in devices)
    seed_ = torch.default_generator.manual_seed if on_cpu else torch.manual_seed

    def start(block: int) -> Callable[..., None]:
        def hook(_layer: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
            if not paused():
                seed_(mixed((*seed, block)))

        return hook

    with ExitStack() as stack:
        for state in before:
            stack.callback(state.set)
        for block, layer in exits.items():
            stack.callback(layer.register_forward_hook(start(block + 1)).remove)
        seed_(mixed((*seed, 0)))
        yield


def mixed(seed: tuple[int, ...]) -> int:
    """Fold several small numbers into one seed, the same on every machine."""
    mixture = 0
    for part in seed:
        mixture = (mixture * 1_000_003 + part + 1) % (1 << 63)
    return mixture


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Give back the random streams of Python, NumPy and torch as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
