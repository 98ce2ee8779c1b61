"""What happens to the gradients of a block once it has learned: averaged over processes, clipped, stepped.

Always one block by itself. When which block is ready is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_blocklocal.optim.clipping import check_norms, clip_block_, total_norm
from hf_blocklocal.optim.data_parallel import GradientAverager
from hf_blocklocal.optim.stepping import step_block_


class Sharded(Protocol):
    """Parameters of which this process has parts, and others the rest."""

    parts: Mapping[nn.Parameter, nn.Parameter]

    def hand_over_(self) -> None:
        """Put averaged gradients to the parts."""

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes with the other parts."""


class BlockUpdates:
    """Averages, clips and steps the blocks of one run.

    Args:
        world_size: Processes, each of which holds a copy of every block that is here.
        group: Group of those processes; all there are by default.
        together: Runs a function in which this process waits for others.
        sharded: What those processes share out, if anything; it is averaged already.
        check: Told of the norms so far, by block, and the optimizer step; raises if one is not finite.
        combine: Makes of the norms of all blocks what is logged.
    """

    def __init__(
        self,
        world_size: int,
        group: Any = None,
        together: Callable[[Callable[[], Any]], Any] = lambda wait: wait(),
        *,
        sharded: Sharded | None = None,
        check: Callable[[Mapping[int, Tensor], int], None] = check_norms,
        combine: Callable[[Sequence[Tensor]], Tensor] = total_norm,
    ) -> None:
        self.group = group
        self._check, self._combine = check, combine
        self._sharded = sharded
        self._parts = set() if sharded is None else set(sharded.parts.values())
        self._averager = GradientAverager(world_size, group, together)
        self._norms: dict[int, Tensor] = {}

    def average(self, *blocks: Sequence[nn.Parameter], wait: bool) -> None:
        """Average the gradients of blocks over processes, in this order.

        Args:
            *blocks: Their parameters.
            wait: Whether these and all gradients sent off before must be in place on return.
        """
        if self._sharded is not None:
            self._sharded.hand_over_()
        for parameters in blocks:
            self._averager.start([parameter for parameter in parameters if parameter not in self._parts])
        if wait:
            self._averager.finish()

    def step_(
        self,
        block: int,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        max_norm: float,
        checked_step: int | None,
    ) -> None:
        """Clip and step one block at once, and free its gradients.

        Args:
            block: The block.
            parameters: Its parameters.
            optimizer: The optimizer of all blocks.
            max_norm: Largest norm to leave; infinity only measures.
            checked_step: Optimizer step under way, where a norm that is not finite is an error; None where not.

        Raises:
            NonFiniteLossError: If its gradient is not finite. The block is as it was.
        """
        norm = self._clip_(parameters, max_norm)
        if norm is not None:
            self._norms[block] = norm
        if norm is not None and checked_step is not None:
            self._check(self._norms, checked_step)
        step_block_(optimizer, parameters)

    def clip_(self, blocks: Sequence[Sequence[nn.Parameter]], *, max_norm: float, checked_step: int | None) -> Tensor:
        """Clip every block that still has gradients.

        Args:
            blocks: The parameters of all blocks.
            max_norm: Largest norm to leave in each; infinity only measures.
            checked_step: Optimizer step under way, where a norm that is not finite is an error; None where not.

        Returns:
            What `combine` makes of the norms of all blocks, with those that were stepped since the last call: by
            default, the norm of all together.

        Raises:
            NonFiniteLossError: If the gradient of a block is not finite.
        """
        for block, parameters in enumerate(blocks):
            if (norm := self._clip_(parameters, max_norm)) is not None:
                self._norms[block] = norm
        if checked_step is not None:
            self._check(self._norms, checked_step)
        norms = list(self._norms.values())
        self._norms.clear()
        return self._combine(norms)

    def _clip_(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor | None:
        if self._sharded is None:
            return clip_block_(parameters, max_norm)
        return clip_block_(parameters, max_norm, parts=self._parts, add_up=self._sharded.sum)
