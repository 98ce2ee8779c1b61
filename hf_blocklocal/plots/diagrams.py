"""Figures that are no curves: how a model was cut, what devices held, who computed what when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_blocklocal.plots.style import GREY, INK, canvas, shades
from hf_blocklocal.records.history import BlockOfCut, CutRow, Memory, Timeline


STOP = "#b3261e"
PAPER = "#f4f2ee"
# Blocks up to which there is room for horizontal words.
UPRIGHT = 5
# Steps of a timeline that are drawn, the last ones, so that the stretches can still be seen.
STEPS = 4


def draw_cut(rows: Sequence[CutRow]) -> Any:
    """Draw the blocks of a model along its layers, with their heads and the stops between; the last row counts."""
    blocks = rows[-1].blocks
    starts, width = _widths(blocks)
    upright = len(blocks) <= UPRIGHT
    figure, axes = canvas(
        f"How {rows[-1].model} was cut",
        "Blocks along the layers, with what each learns from. No gradient goes back over a red line.",
        x_label="layer",
        height=3.6 if upright else 6.0,
    )
    colors = shades("viridis", len(blocks), 0.0, 0.78)
    words = {"ha": "center", "va": "center", "rotation": 0 if upright else 90}
    words["fontsize"] = min(9.5, 34 / len(blocks)) if upright else min(8.0, 130 / len(blocks))
    for index, (block, (start, stop)) in enumerate(zip(blocks, starts, strict=True)):
        middle, is_last = (start + stop) / 2, index == len(blocks) - 1
        axes.broken_barh([(start + 0.04, stop - start - 0.08)], (0, 1), color=colors[index])
        axes.text(middle, 0.5, _told(index, block), color=_readable_on(colors[index]), **words)
        axes.broken_barh([(start + 0.12, stop - start - 0.24)], (1.35, 0.9), facecolor=PAPER, edgecolor=colors[index])
        axes.annotate("", (middle, 1.35), (middle, 1.0), arrowprops={"arrowstyle": "<->", "color": GREY})
        axes.text(middle, 1.8, _head(block, is_last), **words)
        if not is_last:
            axes.plot([stop, stop], [-0.1, 1.1], color=STOP, linewidth=3, solid_capstyle="butt")
    axes.set_xlim(0, width)
    axes.set_ylim(-0.15, 2.35)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xticks(*_layer_ticks(blocks))
    return figure


def _told(index: int, block: BlockOfCut) -> str:
    layers = "all layers" if block.first is None else _named(block.first, block.last)
    return f"block {index}\n{layers}\n{short(block.parameters)} parameters\n{block.device}"


def _readable_on(color: tuple[float, ...]) -> str:
    red, green, blue = color[:3]
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"


def _widths(blocks: Sequence[BlockOfCut]) -> tuple[list[tuple[float, float]], float]:
    """Return where each block begins and ends along the axis, and where the axis ends."""
    if blocks[0].first is None:
        return [(0.0, 1.0)], 1.0
    spans = [(float(block.first), float(block.last + 1)) for block in blocks]
    return spans, spans[-1][1]


def _layer_ticks(blocks: Sequence[BlockOfCut]) -> tuple[list[float], list[str]]:
    if blocks[0].first is None:
        return [], []
    count = blocks[-1].last + 1
    every = max(1, round(count / 16))
    return [layer + 0.5 for layer in range(0, count, every)], [str(layer) for layer in range(0, count, every)]


def _named(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def _head(block: BlockOfCut, is_last: bool) -> str:
    taught = block.taught_by.replace(", ", "\n", 1).replace(" through ", "\nthrough ")
    if is_last:
        return taught.replace("the model's own ", "the model's\nown ")
    cost = "" if block.cost is None else f", cost {'<1' if block.cost < 0.01 else round(100 * block.cost)} %"
    return f"{taught}\n{short(block.head)} parameters{cost}"


def short(count: int) -> str:
    """Write a count of parameters in a few letters."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return str(count)


def draw_memory(rows: Sequence[Memory]) -> Any:
    """Draw the peak of each device as a bar."""
    peaks = {(row.process, row.device): row for row in rows}
    figure, axes = canvas(
        "Memory by device",
        "The most in use: allocated by torch, or held by the whole process.",
        x_label="GiB",
        height=1.8 + 0.5 * len(peaks),
    )
    several = len({process for process, _ in peaks}) > 1
    names = [f"process {process}, {device}" if several else device for process, device in peaks]
    sizes = [row.peak_bytes / 2**30 for row in peaks.values()]
    colors = shades("viridis", len(peaks), 0.0, 0.78)
    axes.barh(range(len(peaks)), sizes, color=colors, height=0.6)
    for place, (size, row) in enumerate(zip(sizes, peaks.values(), strict=True)):
        axes.text(size, place, f" {size:.2f} ({row.counted})", va="center", color=INK)
    axes.set_yticks(range(len(peaks)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(sizes))
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    return figure


def draw_timeline(rows: Sequence[Timeline]) -> Any:
    """Draw who computed what when: a lane for each block, a stretch for each piece of work, in the last few steps."""
    steps = sorted({row.step for row in rows})[-STEPS:]
    shown = [row for row in rows if row.step in steps]
    start = min(row.start for row in shown)
    blocks = sorted({row.block for row in shown})
    figure, axes = canvas(
        "Who computed what when",
        f"Each block has a lane; colours are steps {steps[0]} to {steps[-1]}. Gaps are waiting.",
        x_label="seconds",
        height=1.8 + 0.6 * len(blocks),
    )
    colors = dict(zip(steps, shades("viridis", len(steps), 0.0, 0.78), strict=True))
    works = list(dict.fromkeys(row.work for row in shown))
    for row in shown:
        lane = blocks.index(row.block)
        strength = 1 - 0.55 * works.index(row.work) / max(len(works) - 1, 1)
        place = (row.start - start, row.stop - row.start)
        axes.broken_barh([place], (lane - 0.35, 0.7), color=colors[row.step], alpha=strength, edgecolor="white")
    axes.set_yticks(range(len(blocks)), [f"block {block}" for block in blocks])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    named = [work for work in works if work]
    if len(named) > 1:
        axes.set_xlabel(f"seconds; from dark to pale: {', '.join(named)}")
    return figure
