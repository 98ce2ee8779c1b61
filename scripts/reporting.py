"""The table that scripts/train.py ends with. Not a command of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from recipes import Outcome


def report(outcomes: Sequence[Outcome]) -> str:
    """Return the table: metric of every block, of the model and its smaller sizes; time, peak activation bytes."""
    metric = outcomes[0].metric
    lines = [f"{'':40}{'test ' + metric:>14}{'ms per text':>13}{'train time':>12}{'peak activations':>18}"]
    for outcome in outcomes:
        lines += rows_of_heads(outcome)
        for size in outcome.sizes[:-1]:
            lines.append(f"  {size['name']:38}{size['value']:14.3f}{size['milliseconds']:13.1f}")
        whole = f"{outcome.sizes[-1]['milliseconds']:13.1f}" if outcome.sizes else f"{'':13}"
        lines.append(
            f"{outcome.name:40}{outcome.metrics['eval_' + metric]:14.3f}{whole}{outcome.seconds:10.0f} s"
            f"{outcome.peak_bytes / 2**20:14.1f} MiB"
        )
    return "\n".join(lines)


def rows_of_heads(outcome: Outcome) -> list[str]:
    """Return a line per head: in the task's own metric, or in the one that heads have where that is another."""
    metrics = outcome.metrics
    for metric in (outcome.metric, "accuracy", "loss"):
        pattern = re.compile(rf"eval_block_(\d+)_{metric}")
        found = {int(match[1]): metrics[match[0]] for match in map(pattern.fullmatch, metrics) if match}
        if found:
            unit = "" if metric == outcome.metric else f" ({metric})"
            return [f"  {f'head of block {block}{unit}':38}{found[block]:14.3f}" for block in sorted(found)]
    return []
