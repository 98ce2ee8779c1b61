"""Draw the history of a run, block by block: one idea per figure, one PNG each.

Only `history.jsonl` is read, or, in runs that have none, `trainer_state.json`, so a run can be drawn anywhere and at
any time, also while it goes on. Nothing global is touched: no pyplot, no backend, no style.
"""

from __future__ import annotations

from hf_blocklocal.plots.curves import PICTURES, curves_of, spread
from hf_blocklocal.plots.run import draw, draw_run, find_source


__all__ = ["PICTURES", "curves_of", "draw", "draw_run", "find_source", "spread"]
