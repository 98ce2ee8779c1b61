"""How every figure looks: one canvas, few colours, a title, and a line that says how to read it."""

from __future__ import annotations

from typing import Any

from hf_blocklocal.extras import optional


INK, GREY, GRID = "#222222", "#6b6b6b", "#e4e4e4"
STYLE = {
    "font.size": 11,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.0,
    "lines.solid_capstyle": "round",
}


def canvas(title: str, reading: str, *, x_label: str = "", y_label: str = "", height: float = 4.6) -> tuple[Any, Any]:
    """Return a new figure and its axes; nothing global is touched."""
    matplotlib = optional("matplotlib", extra="plots")
    with matplotlib.rc_context(STYLE):
        figure = optional("matplotlib.figure", extra="plots").Figure(figsize=(8, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
        axes = figure.add_subplot()
        axes.set_title(title, pad=26)
        axes.text(0, 1.03, reading, transform=axes.transAxes, fontsize=9.5, color=GREY, va="bottom")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(visible=False, axis="x")
    return figure, axes


def shades(name: str, count: int, low: float, high: float) -> list[Any]:
    """Return colours of a map that grows in lightness, which everybody can tell apart and put in order."""
    colors = optional("matplotlib", extra="plots").colormaps[name]
    return [colors(low + (high - low) * number / max(count - 1, 1)) for number in range(count)]
