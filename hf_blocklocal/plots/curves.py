"""Curves of what a run has logged, block by block: over time, and over depth."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_blocklocal.extras import optional
from hf_blocklocal.plots.style import GREY, canvas, shades


MARKERS = "osD^vPX"
# Times that are drawn over depth, so that the lines can still be told apart.
TIMES = 5

Curve = dict[float, float]
"""Value by optimizer step, or by depth."""


@dataclass(frozen=True)
class Picture:
    """One figure: which numbers of the history it shows, and in what words.

    Attributes:
        name: Name of its file, without ending.
        title: What it shows.
        reading: How to read it.
        unit: Label of the y axis.
        key: Pattern of the keys in the history, with a group `block`, and `set` where there may be several data sets.
        model: Key under which the whole model's number stands, if the pattern does not find it; `{set}` is filled in.
        percent: Whether values are shares.
        log: Whether only ratios of values mean something.
        target: A value to compare with, drawn as a dashed line.
        by_depth: Title of a second figure, over the blocks; none without.
    """

    name: str
    title: str
    reading: str
    unit: str
    key: str
    model: str | None = None
    percent: bool = False
    log: bool = False
    target: float | None = None
    by_depth: str | None = None


PICTURES = (
    Picture(
        "loss",
        "What each block learns from",
        "Training loss of each block, on the batches it has just seen. The last block has the model's own.",
        "loss",
        r"block_(?P<block>\d+)/loss",
    ),
    Picture(
        "evaluation_loss",
        "Loss on the evaluation set",
        "What the model would lose if it ended after a block, as the head of that block predicts.",
        "loss",
        r"eval_(?P<set>.+_)?block_(?P<block>\d+)_loss",
        model="eval_{set}loss",
    ),
    Picture(
        "accuracy",
        "Accuracy on the evaluation set",
        "What the model would get right if it ended after a block, as the head of that block predicts.",
        "accuracy",
        r"eval_(?P<set>.+_)?block_(?P<block>\d+)_accuracy",
        model="eval_{set}accuracy",
        percent=True,
        by_depth="Accuracy by depth",
    ),
    Picture(
        "alignment",
        "Does a block go where backpropagation would go?",
        "Cosine between the local gradient of a block and the gradient of backpropagation. 1 is the same direction.",
        "cosine",
        r"alignment/block_(?P<block>\d+)",
        target=1.0,
    ),
    Picture(
        "norm_ratio",
        "Is the pull on a block as strong?",
        "Length of the local gradient of a block over that of backpropagation. 1 is the same length.",
        "ratio of lengths",
        r"norm_ratio/block_(?P<block>\d+)",
        log=True,
        target=1.0,
    ),
    Picture(
        "probe",
        "What can be read from the output of a block",
        "Test accuracy of a linear classifier, fitted anew each time to what a block puts out.",
        "accuracy of the probe",
        r"probe/block_(?P<block>\d+)",
        percent=True,
        by_depth="What can be read from the output of a block, by depth",
    ),
    Picture(
        "drift",
        "How far the weights have gone",
        "Distance of the weights of a block from those it started with, relative to their length.",
        "relative distance",
        r"drift/block_(?P<block>\d+)",
        percent=True,
    ),
)


def draw_curves(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a matplotlib figure, by name, for every picture that the rows of a log history have something for."""
    found = {picture: curves_of(history, picture) for picture in PICTURES}
    blocks = 1 + max((block for sets in found.values() for curves in sets.values() for block in curves), default=0)
    layers = _layers(history)
    figures = {}
    for picture, sets in found.items():
        for name, curves in sets.items():
            suffix = f"_{name.rstrip('_')}" if name else ""
            figures[f"{picture.name}{suffix}"] = _over_steps(picture, curves, blocks)
            if picture.by_depth is not None and len(curves) > 1:
                figures[f"{picture.name}_by_depth{suffix}"] = _over_depth(picture, curves, layers)
    return figures


def curves_of(history: Sequence[Mapping[str, Any]], picture: Picture) -> dict[str, dict[int, Curve]]:
    """Pick the curve of each block from a history, for each data set; of rows of the same step the last counts."""
    sets: dict[str, dict[int, Curve]] = {}
    for row in history:
        for key, value in row.items():
            if (match := re.fullmatch(picture.key, key)) and "step" in row:
                curves = sets.setdefault(match.groupdict().get("set") or "", {})
                curves.setdefault(int(match["block"]), {})[row["step"]] = value
    if picture.model is not None:
        for name, curves in sets.items():
            key = picture.model.format(set=name)
            if whole := {row["step"]: row[key] for row in history if key in row and "step" in row}:
                curves[max(curves) + 1] = whole
    elif picture.name == "loss" and not sets:  # a single block
        alone = {row["step"]: row["loss"] for row in history if "loss" in row and "step" in row}
        sets = {"": {0: alone}} if alone else {}
    return {
        name: {block: dict(sorted(curves[block].items())) for block in sorted(curves)} for name, curves in sets.items()
    }


def _layers(history: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Return the last layer of each block, where a probe has said it."""
    return {
        int(key.removeprefix("probe_layer/block_")): int(value)
        for row in history
        for key, value in row.items()
        if key.startswith("probe_layer/block_")
    }


def _over_steps(picture: Picture, curves: Mapping[int, Curve], blocks: int) -> Any:
    figure, axes = canvas(picture.title, picture.reading, x_label="optimizer step", y_label=picture.unit)
    colors = shades("viridis", blocks, 0.0, 0.78)
    ends = []
    for block, curve in curves.items():
        marker = MARKERS[block % len(MARKERS)] if len(curve) <= 40 else None
        axes.plot(list(curve), list(curve.values()), color=colors[block], marker=marker, zorder=2 + block / 100)
        whole = picture.model is not None and block == max(curves) == blocks - 1
        ends.append((curve, "whole model" if whole else f"block {block}", colors[block]))
    axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(axes, picture, ends)
    return figure


def _over_depth(picture: Picture, curves: Mapping[int, Curve], layers: Mapping[int, int]) -> Any:
    figure, axes = canvas(picture.by_depth or picture.title, picture.reading, y_label=picture.unit)
    steps = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    count = min(TIMES, len(steps))
    chosen = [steps[round(number * (len(steps) - 1) / max(count - 1, 1))] for number in range(count)]
    ends = []
    for step, color in zip(chosen, shades("cividis_r", count, 0.25, 1.0), strict=True):
        line = {float(block): curve[step] for block, curve in curves.items()}
        axes.plot(list(line), list(line.values()), color=color, marker="o")
        ends.append((line, f"step {step}", color))
    names = {block: f"block {block}" for block in curves}
    if picture.model is not None:
        names[max(curves)] = "whole model"
    ticks = [f"{name}\nlayer {layers[block]}" if block in layers else name for block, name in names.items()]
    axes.set_xticks(list(names), ticks)
    _finish(axes, picture, ends)
    return figure


def _finish(axes: Any, picture: Picture, ends: Sequence[tuple[Curve, str, Any]]) -> None:
    """Scale the y axis and write the name of each line beside its end."""
    if picture.target is not None:
        axes.axhline(picture.target, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1)
        if not picture.log:  # so that runs look alike where they are alike
            axes.axhline(0, color=GREY, linestyle=":", linewidth=1.2, zorder=1)
    ticker = optional("matplotlib.ticker", extra="plots")
    if picture.log:
        values = [abs(value) for curve, _, _ in ends for value in curve.values() if value]
        narrow = max(values) < 5 * min(values)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(
            ticker.MaxNLocator(6, steps=[1, 2, 5, 10]) if narrow else ticker.LogLocator(subs=(1, 2, 5))
        )
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    if picture.percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.6g} %")
    axes.margins(x=0.02, y=0.08)
    axes.autoscale_view()
    scale = axes.transScale + axes.transLimits
    heights = [scale.transform((0, list(curve.values())[-1]))[1] for curve, _, _ in ends]
    for height, (_, name, color) in zip(spread(heights, gap=min(0.065, 1 / len(ends))), ends, strict=True):
        axes.text(1.015, height, name, transform=axes.transAxes, color=color, va="center", weight="bold")


def spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """Move heights apart, in their order, until neighbours are a gap apart; each group stays around its middle."""
    order = sorted(range(len(heights)), key=lambda index: (math.isnan(heights[index]), heights[index]))
    groups: list[list[float]] = []  # sum of the middles that members ask for, number of members
    for rank, index in enumerate(order):
        wish = 0.0 if math.isnan(heights[index]) else heights[index]
        groups.append([wish - rank * gap, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, members = groups.pop()
            groups[-1] = [groups[-1][0] + total, groups[-1][1] + members]
    bases = [total / members for total, members in groups for _ in range(int(members))]
    placed = {index: bases[rank] + rank * gap for rank, index in enumerate(order)}
    return [placed[index] for index in range(len(heights))]
