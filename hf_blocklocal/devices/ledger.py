"""What a run on several devices looks at only when it must wait anyway: losses and gradients that are not finite.

To read a number makes the host wait for the device that has it, and so all devices for the last. So each block keeps,
on its own device, the first step at which something was wrong; the numbers are read when logs and checkpoints are due.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_blocklocal.errors import NonFiniteLossError
from hf_blocklocal.optim.clipping import total_norm
from hf_blocklocal.teaching.report import StepReport


class Ledger:
    """Notes of the losses and gradient norms of all blocks since the run began."""

    def __init__(self) -> None:
        self._first_bad: dict[tuple[str, int], Tensor] = {}
        self._norms: list[Tensor] = []

    def note_losses(self, report: StepReport, step: int) -> None:
        """Note the losses of a micro-batch.

        Args:
            report: What the blocks have said.
            step: Optimizer step under way, from 1.
        """
        for block, loss in enumerate(report.losses, report.first):
            self._note("loss", block, loss, step)

    def note_norms(self, norms: Mapping[int, Tensor], step: int) -> None:
        """Note the norms of the gradients of blocks."""
        for block, norm in norms.items():
            self._note("gradient", block, norm, step)

    def keep_norms(self, norms: Sequence[Tensor]) -> Tensor:
        """Keep the norms of a step for the logs, and return nothing in their place."""
        self._norms = list(norms)
        return torch.tensor(0.0)

    @property
    def grad_norm(self) -> float:
        """The norm of all blocks together in the last step. Waits for all devices.

        Blocks whose gradients are not finite do not count: either the step was left out, or `check` stops the run.
        """
        return total_norm([norm for norm in self._norms if norm.isfinite()]).item()

    def _note(self, what: str, block: int, value: Tensor, step: int) -> None:
        value = value.detach()
        first = self._first_bad.get((what, block))
        if first is None:
            first = torch.zeros((), dtype=torch.int64, device=value.device)
        is_news = value.isfinite().logical_not() & (first == 0)
        self._first_bad[what, block] = torch.where(is_news, step, first)

    def check(self, step: int) -> None:
        """Stop a run in which something was not finite. Waits for all devices.

        Args:
            step: Optimizer steps taken so far.

        Raises:
            NonFiniteLossError: If a loss or a gradient has been NaN or infinite.
        """
        found = {key: first.item() for key, first in self._first_bad.items()}
        bad = {key: first for key, first in found.items() if first > 0}
        if not bad:
            return
        (what, block), first = min(bad.items(), key=lambda item: (item[1], item[0][0] == "gradient", item[0][1]))
        raise NonFiniteLossError(
            f"The {what} of block {block} was not finite at step {first}, as is seen after step {step}: with blocks "
            "on several devices, only logs and checkpoints look. Weights of that block may be spoilt; no checkpoint "
            "holds them. Look at the data of that step, lower the learning rate, and resume from the last checkpoint. "
            "logging_steps=1 finds it at once."
        )
