"""From the folder of a run to its figures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_blocklocal.errors import NothingToDrawError
from hf_blocklocal.extras import optional
from hf_blocklocal.plots.curves import draw_curves
from hf_blocklocal.plots.diagrams import draw_cut, draw_memory, draw_timeline
from hf_blocklocal.plots.style import STYLE
from hf_blocklocal.records.history import HISTORY_NAME, CutRow, Logged, Memory, Row, Timeline, read_history


STATE_NAME = "trainer_state.json"


def draw_run(folder: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> list[Path]:
    """Draw what the history of a run has to show.

    Args:
        folder: Folder of the run, or of one of its checkpoints.
        output: Folder for the PNGs, made if need be. Default: `plots` in the folder of the run.

    Returns:
        The PNGs.

    Raises:
        NothingToDrawError: If the folder is none of a run, or the history holds nothing to draw.
        HistoryError: If a line of the history is no row.
        MissingExtraError: If matplotlib is not installed.
    """
    source = find_source(folder)
    rows: Sequence[Row | Mapping[str, Any]]
    if source.name == HISTORY_NAME:
        rows = read_history(source)
    else:
        rows = json.loads(source.read_text(encoding="utf-8")).get("log_history", [])
    figures = draw(rows)
    if not figures:
        raise NothingToDrawError(
            f"{source} holds {len(rows)} rows and nothing to draw: no loss, no evaluation, no diagnostics. Train "
            "with logging_steps smaller than the run, an eval_strategy, or the callbacks of hf_blocklocal.callbacks."
        )
    target = Path(folder) / "plots" if output is None else Path(output)
    target.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(target / f"{name}.png")
        with optional("matplotlib", extra="plots").rc_context(STYLE):
            figure.savefig(paths[-1], dpi=160, format="png")
    return paths


def find_source(folder: str | os.PathLike[str]) -> Path:
    """Return the history of a run, or, where it has none, its newest `trainer_state.json`, of a checkpoint if need be.

    Raises:
        NothingToDrawError: If there is neither.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NothingToDrawError(f"There is no folder {root}. Give the output_dir of a run.")
    if (root / HISTORY_NAME).is_file():
        return root / HISTORY_NAME
    states = [*root.glob(STATE_NAME), *root.glob(f"checkpoint-*/{STATE_NAME}")]
    if not states:
        raise NothingToDrawError(
            f"{root} holds no {HISTORY_NAME} and no {STATE_NAME}, nor does a checkpoint in it, so it is not the "
            "output_dir of a run, or one that saved nothing. Call trainer.save_state() after train()."
        )
    return max(states, key=lambda path: path.stat().st_mtime_ns)


def draw(rows: Sequence[Row | Mapping[str, Any]]) -> dict[str, Any]:
    """Return a matplotlib figure, by name, for everything that rows have something to show for.

    Args:
        rows: Rows of a history, or those of `TrainerState.log_history`, or both.
    """
    logs = [{"step": row.step, **row.values} if isinstance(row, Logged) else row for row in rows]
    figures = draw_curves([row for row in logs if isinstance(row, Mapping)])
    diagrams = {"cut": (CutRow, draw_cut), "memory": (Memory, draw_memory), "timeline": (Timeline, draw_timeline)}
    for name, (kind, draw_rows) in diagrams.items():
        if found := [row for row in rows if isinstance(row, kind)]:
            figures[name] = draw_rows(found)
    return figures
