"""One training step of an assembly, without a trainer."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_blocklocal import Assembly
from hf_blocklocal.targets.batch import Targets


def stepped(
    assembly: Assembly, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], targets: Targets, *, step: int
) -> list[Tensor]:
    """Teach all blocks a batch and step the optimizer. Returns the losses of the blocks, wherever they are."""
    lesson = assembly.step.teach(
        targets,
        scale=1 / len(targets),
        backward=torch.Tensor.backward,
        learned=lambda *_: None,
        inputs=batch,
        seed=(step,),
    )
    with lesson as report:
        loss = assembly.module.model(**batch).loss
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return [*report.losses, loss.detach()]
