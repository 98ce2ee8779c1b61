"""Ask of a block that a little noise in its input changes little in its output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_blocklocal.randomness import mixed
from hf_blocklocal.targets.batch import Targets
from hf_blocklocal.teaching.replay import Replay


NOISE = 0.01
"""Standard deviation of the noise."""


class Denoising:
    """Mean squared distance between the block's output and that for a noisy input.

    `weight * mean |f(a + 0.01 noise) - f(a)|^2` with a standard normal `noise`; f(a) is the output of the block's
    first run, and neither it nor a learns from this. f is the layers of the block, with the same dropout both times;
    what enters block 0 is what the embeddings make of the inputs. The mean is over units and positions without
    padding. It is a term of the public experiments of Kappel et al. (2023), arXiv 2305.14974.

    Args:
        replay: Runs a block a second time.
        weight: Weight beside the loss of the head.
    """

    def __init__(self, replay: Replay, weight: float) -> None:
        self.replay = replay
        self.weight = weight

    def __call__(
        self, block: int, hidden: Tensor, targets: Targets, inputs: Mapping[str, Any], seed: tuple[int, ...]
    ) -> Tensor:
        """Return the term, one number.

        Args:
            block: The block, whose first run is over.
            hidden: Its output.
            targets: Targets of the batch, which know its padding.
            inputs: The model's inputs.
            seed: What the noise is drawn from, together with the block.
        """
        given = self.replay.inlets[block].hidden
        generator = torch.Generator(given.device).manual_seed(mixed((*seed, block)))
        noise = torch.randn(given.shape, generator=generator, device=given.device, dtype=given.dtype)
        again = self.replay.output(block, given + NOISE * noise, inputs)
        return self.weight * targets.mean_square(again - hidden.detach())
