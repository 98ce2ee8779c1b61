"""Fit the norm and the task head behind the last layer of a model to some batches, everything below standing still."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_blocklocal.errors import NonFiniteLossError, TruncationError
from hf_blocklocal.targets.batch import has_labels


def fit_(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    batches: Iterable[Mapping[str, Any]],
    *,
    steps: int,
    learning_rate: float,
) -> tuple[float, float]:
    """Take a few steps of AdamW from the model's own loss, without dropout, on a schedule that falls to 0.

    Args:
        model: The model; in evaluation mode afterwards.
        parameters: What is fitted; all others stand still.
        batches: Batches with labels, taken again from the start where they end.
        steps: Steps to take.
        learning_rate: The first learning rate.

    Returns:
        The mean loss over the first and over the last quarter of the steps.

    Raises:
        TruncationError: If there is no batch, or one without labels.
        NonFiniteLossError: If the loss becomes NaN or infinite.
    """
    fitted = list(parameters)
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    for parameter in fitted:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(fitted, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    try:
        for batch in itertools.islice(_endless(batches), steps):
            with torch.enable_grad():
                loss = model(**on_device(batch, model.device)).loss
                loss.backward()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise NonFiniteLossError(
                    f"The loss became {losses[-1]} in step {len(losses)} of calibration. Use a smaller learning_rate."
                )
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    finally:
        for parameter, before in zip(model.parameters(), trainable, strict=True):
            parameter.requires_grad_(before)
    quarter = math.ceil(steps / 4)
    return sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _endless(batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    while True:
        found = False
        for batch in batches:
            if not isinstance(batch, Mapping) or not has_labels(batch):
                given = sorted(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
                raise TruncationError(
                    f"calibration must yield batches of tensors with 'labels', as a DataLoader does, not {given}."
                )
            found = True
            yield batch
        if not found:
            raise TruncationError("calibration yields no batch. Give a DataLoader, or a list of batches.")
