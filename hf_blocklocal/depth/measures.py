"""Measure what a model gets right and what it costs: one row for each depth, or for each threshold of early exits."""

# Shapes: B samples of a batch.

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_blocklocal.anatomy.embeddings import vocabulary_size
from hf_blocklocal.anatomy.layers import is_encoder_decoder
from hf_blocklocal.anatomy.modes import evaluation_mode
from hf_blocklocal.depth.calibration import on_device
from hf_blocklocal.depth.exits import EarlyExit
from hf_blocklocal.depth.opening import Opened
from hf_blocklocal.depth.truncation import Fit, layers_kept, save, shortened
from hf_blocklocal.errors import TargetError, TruncationError
from hf_blocklocal.records.operations import operation_counter
from hf_blocklocal.targets.batch import IGNORED, has_labels, labels_of
from hf_blocklocal.targets.spans import answer_logits, has_spans


@dataclass(frozen=True)
class Depth:
    """What one model came to on some data.

    Attributes:
        name: What it is.
        layers: Layers that a sample runs through on average, those that heads borrow not counted.
        parameters: Parameters of the model.
        milliseconds: Wall time of a forward pass, for each sample.
        operations: Floating-point operations of a forward pass, for each sample; None if they were not counted.
        metric: `accuracy`, `perplexity` or `loss`.
        value: Its value.
        exits: How many samples have left at each block, for early exits.
        threshold: Their threshold.
    """

    name: str
    layers: float
    parameters: int
    milliseconds: float
    operations: float | None
    metric: str
    value: float
    exits: dict[int, int] | None = None
    threshold: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def measure(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], *, name: str, layers: int, count: bool = True
) -> Depth:
    """Run a model over some batches: for time, for quality, and to count operations.

    Args:
        model: A model, or one with early exits.
        batches: Batches with labels. How they are padded decides what a sample costs.
        name: What to call it.
        layers: Its layers, those of all blocks for one with early exits.
        count: Whether to count operations.

    Raises:
        TargetError: If there is no batch, or one without labels.
    """
    batches = [on_device(batch, model.device) for batch in batches]
    if not batches or not all(has_labels(batch) for batch in batches):
        raise TargetError("There is nothing to measure with: give batches with labels.")
    score, exits = _Score(model), Counter() if isinstance(model, EarlyExit) else None
    seconds, samples, operations = 0.0, sum(len(labels_of(batch)) for batch in batches), None
    with evaluation_mode(model), torch.no_grad():
        model(**_without_labels(model, batches[0]))  # to warm up
        for batch in batches:
            output, passed = _timed(model, _without_labels(model, batch))
            seconds += passed
            score.add(model, batch, output)
            if exits is not None:
                exits.update(model.exits_B.tolist())
        if count:
            with operation_counter() as counter:
                for batch in batches:
                    model(**_without_labels(model, batch))
            operations = counter.get_total_flops() / samples
    metric, value = score.result()
    return Depth(
        name=name,
        layers=layers if exits is None else _mean_layers(model, exits),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        milliseconds=1000 * seconds / samples,
        operations=operations,
        metric=metric,
        value=value,
        exits=None if exits is None else dict(sorted(exits.items())),
        threshold=None if exits is None else model.threshold,
    )


def measure_depths(
    opened: Opened,
    batches: Sequence[Mapping[str, Any]],
    *,
    fit: Fit | None = None,
    output: str | os.PathLike[str] | None = None,
    count: bool = True,
) -> list[Depth]:
    """Measure every size of a trained model, the whole one last.

    Where heads borrow layers, there are two models for each block but the last: with what its head borrows, unless
    that is all there is above it; and without, its task head fitted.

    Args:
        opened: The trained model.
        batches: Batches with labels.
        fit: How task heads are fitted that have to be. Without, models that would need it are left out.
        output: Folder to save all of them in but the whole one, each in a folder of its own.
        count: Whether to count operations.
    """
    cut, rows = opened.assembly.cut, []
    opened.warn_of_heads("Smaller models with what their heads borrow", range(opened.assembly.last))
    for block, head in enumerate(opened.assembly.heads):
        for keep_borrowed in (True, False) if head.borrows else (True,):
            name = f"{block + 1} of {cut.num_blocks} blocks"
            layers = layers_kept(opened, block + 1, keep_borrowed=keep_borrowed)
            if len(layers) == len(cut.layers):
                continue
            try:
                small, how = shortened(opened, block + 1, keep_borrowed=keep_borrowed, fit=fit)
            except TruncationError:
                if fit is not None:
                    raise
                continue
            borrowed = len(layers) - cut.spans[block].stop
            if borrowed:
                name += f" and {borrowed} borrowed layer{'s' * (borrowed > 1)}"
            elif "fitted" in how:
                name += ", head fitted"
            rows.append(measure(small, batches, name=name, layers=len(layers), count=count))
            if output is not None:
                folder = f"{block + 1}-blocks" + ("-and-borrowed" if borrowed else "")
                save(small, Path(output) / folder, companions_of=opened.folder)
    layers = sum(1 for _ in cut.layers) or getattr(opened.model.config, "num_hidden_layers", 0)
    return [*rows, measure(opened.model, batches, name="the whole model", layers=layers, count=count)]


def sweep(model: EarlyExit, batches: Sequence[Mapping[str, Any]], thresholds: Iterable[float]) -> list[Depth]:
    """Measure accuracy against compute: one row for each threshold. The model keeps the threshold it had.

    Args:
        model: A classifier with early exits.
        batches: Batches with labels.
        thresholds: Thresholds to try; above 1, the whole model with the hooks in it.
    """
    before, rows = model.threshold, []
    try:
        for threshold in thresholds:
            model.threshold = threshold
            rows.append(
                measure(model, batches, name=f"early exit at {threshold:g}", layers=len(model.assembly.cut.layers))
            )
    finally:
        model.threshold = before
    return rows


def table(rows: Sequence[Depth]) -> str:
    """Return rows as text, operations relative to those of the last row."""
    whole = rows[-1].operations or 1
    header = ("", "layers", "parameters", "operations", "ms per sample", rows[0].metric)
    cells = [
        (
            row.name,
            f"{row.layers:.2f}".removesuffix(".00"),
            f"{row.parameters:,}",
            "" if row.operations is None else f"{row.operations / whole:.0%}",
            f"{row.milliseconds:.2f}",
            f"{row.value:.3f}",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in (header, *cells)) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(line))
        for line in (zip(row, widths, strict=True) for row in (header, *cells))
    )


def _without_labels(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Leave the labels out, unless a decoder's inputs are made from them."""
    if is_encoder_decoder(model) and not has_spans(batch) and batch["labels"].dim() == 2:
        return dict(batch)
    labels = ("labels", "start_positions", "end_positions")
    return {name: value for name, value in batch.items() if name not in labels}


def _timed(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, float]:
    """Run a model. Returns its output and the seconds that it took."""
    start = time.perf_counter()
    output = model(**inputs)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return output, time.perf_counter() - start


def _mean_layers(model: EarlyExit, exits: Mapping[int, int]) -> float:
    spans = model.assembly.cut.spans
    return sum(spans[block].stop * count for block, count in exits.items()) / sum(exits.values())


class _Score:
    """Adds up hits where a sample, a position or an end of a span has one class, elsewhere the model's own loss."""

    def __init__(self, model: nn.Module) -> None:
        self._is_language_model = vocabulary_size(model) is not None
        self._sum, self._count = 0.0, 0
        self._metric = "accuracy"

    def add(self, model: nn.Module, batch: Mapping[str, Any], output: Any) -> None:
        """Add one batch, and what the model has returned for it without its labels."""
        labels, logits = labels_of(batch), answer_logits(output)
        if has_spans(batch):  # starts and ends count each by itself, unless they are behind the end of the text
            logits = logits.transpose(1, 2)
            labels = labels.masked_fill(labels >= logits.shape[-1], IGNORED)
        counted = torch.ones_like(labels, dtype=torch.bool) if labels.is_floating_point() else labels != IGNORED
        if self._is_language_model or labels.is_floating_point() or labels.shape != logits.shape[:-1]:
            self._metric = "perplexity" if self._is_language_model else "loss"
            self._sum += model(**batch).loss.item() * int(counted.sum())
        else:
            self._sum += int((logits.argmax(-1) == labels)[counted].sum())
        self._count += int(counted.sum())

    def result(self) -> tuple[str, float]:
        """Return the name of the metric and its value."""
        mean = self._sum / self._count
        return self._metric, math.exp(min(mean, 700.0)) if self._is_language_model else mean
