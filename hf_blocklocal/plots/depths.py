"""Draw accuracy against compute: what the depths of one model, and its early exits, cost and get right."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_blocklocal.extras import optional
from hf_blocklocal.plots.style import GREY, INK, STYLE


COLORS = ("#440154", "#21918c", "#b5890a")
MARKERS = "osD"


def draw_depths(
    groups: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str], *, title: str, whole: float
) -> Path:
    """Draw rows of measures as a PNG: what a model gets right over its operations, as a share of the whole model's.

    Rows of one group with thresholds are a curve; others are points.

    Args:
        groups: Rows, each a `Depth` as plain values, by the name of their line.
        path: The PNG; its folder is made if need be.
        title: Title of the figure.
        whole: Operations of the whole model.

    Returns:
        The PNG.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    metric = next(row["metric"] for rows in groups.values() for row in rows)
    matplotlib = optional("matplotlib", extra="plots")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = optional("matplotlib.figure", extra="plots").Figure(figsize=(8, 4.6), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        for (name, rows), color, marker in zip(groups.items(), COLORS, MARKERS, strict=False):
            points = sorted((row["operations"] / whole, row["value"], _short(row)) for row in rows)
            shares, values, _ = zip(*points, strict=True)
            is_curve = all(row["threshold"] is not None for row in rows)
            axes.plot(shares, values, color=color, marker=marker, label=name, linestyle="-" if is_curve else "")
            place = (5, -12) if is_curve else (5, 6)
            for share, value, text in points:
                axes.annotate(text, (share, value), place, textcoords="offset points", fontsize=8, color=GREY)
        axes.set_xlabel("operations of a forward pass, relative to the whole model")
        axes.set_ylabel(metric, color=INK)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.margins(x=0.12, y=0.15)
        axes.legend(frameon=False)
        figure.savefig(target, dpi=160, format="png")
    return target


def _short(row: Mapping[str, Any]) -> str:
    return row["name"] if row["threshold"] is None else f"{row['threshold']:g}"
