"""Draw how efficiency falls with the number of ranks, a panel for each number of micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


SHOWN = (1, 8, 32)
LINES = {
    "block-local": ("#0b6e4f", "o", "-"),
    "ZB-H1": ("#c1440e", "s", "-"),
    "interleaved": ("#6a4c93", "D", "--"),
    "1F1B": ("#3a6ea5", "^", "-"),
}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw the rows of a benchmark by number of ranks.

    Args:
        rows: What `scale.by_ranks` yields.
        path: PNG to write.
    """
    from hf_blocklocal.extras import optional
    from hf_blocklocal.plots.style import STYLE

    with optional("matplotlib", extra="plots").rc_context(STYLE):
        figure = optional("matplotlib.figure", extra="plots").Figure(figsize=(11, 4.2), layout="constrained")
        panels = figure.subplots(1, len(SHOWN), sharey=True)
        for panel, micro_batches in zip(panels, SHOWN, strict=True):
            _draw_panel(panel, [row for row in rows if row["m"] == micro_batches])
            panel.set_title(f"{micro_batches} micro-batch{'es' if micro_batches > 1 else ''} per step", fontsize=11)
        panels[0].set_ylabel("efficiency")
        panels[0].legend(frameon=False, fontsize=9, loc="lower left")
        figure.suptitle("Time of the model's own passes, as a share of the ranks' time (simulated)", fontsize=12)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    return path


def _draw_panel(panel: Any, rows: Sequence[dict[str, Any]]) -> None:
    for name, (color, marker, dashes) in LINES.items():
        known = [(row["K"], row[name]) for row in rows if row[name] is not None]
        if known:
            panel.plot(*zip(*known, strict=True), color=color, marker=marker, linestyle=dashes, label=name)
    panel.set_xscale("log", base=2)
    panel.set_xticks([row["K"] for row in rows], [str(row["K"]) for row in rows])
    panel.set_xlabel("ranks")
    panel.set_ylim(0, 1.02)
