"""From the results of single runs to one JSON value: what was chosen for each row, and every run behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from learning_cases import Case, best_run
from learning_runs import Run, Store, package_code


RUN_KEYS = ("rate", "seed", "validation", "test", "remembered", "curve", "cpu_seconds", "wall_seconds", "error")


def summarize(
    cases: Sequence[Case], store: Store, *, seeds: Sequence[int], skipped: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """Gather what all runs came to.

    Args:
        cases: What was run.
        store: Where the results are.
        seeds: Seeds; the first one tunes the learning rate.
        skipped: Rows that the package does not know.

    Returns:
        JSON values: for each task its metrics and budget, and for each case the chosen rate and every run.
    """
    tasks = {}
    for case in cases:
        task = case.task
        about = tasks.setdefault(
            task.name,
            {
                "title": task.title,
                "metric": vars(task.metric),
                "forgetting": vars(task.forgetting) if task.forgetting else None,
                "blocks": list(task.blocks),
                "spec": task.spec(),
                "cases": [],
            },
        )
        about["cases"].append(summary_of(case, store, seeds))
    return {"seeds": list(seeds), "skipped": list(skipped), "tasks": tasks}


def summary_of(case: Case, store: Store, seeds: Sequence[int]) -> dict[str, Any]:
    """Summarize one row on one task with one number of blocks."""
    best = best_run(case, store, seeds[0])
    chosen = [] if best is None else [best, *case.repeats(best.rate, seeds[1:])]
    grid = case.grid(store, seeds[0])
    results = {store.path(run).name: (run, store.load(run)) for run in [*grid, *chosen]}
    scores = {run.rate: (store.load(run) or {}).get("validation") for run in grid}
    local = case.row.method == "local"
    return {
        "row": case.row.name,
        "method": case.row.method,
        "num_blocks": case.num_blocks,
        "rate": best.rate if best else None,
        "at_edge": best is not None and is_at_edge(best.rate, scores),
        "settings": grid[0].settings,
        "other_code": local and any(result and result["code"] != package_code() for _, result in results.values()),
        "runs": [{**_short(run, result), "chosen": run in chosen} for run, result in results.values() if result],
    }


def is_at_edge(rate: float | None, scores: Mapping[float | None, float | None]) -> bool:
    """Tell whether a rate is the lowest or highest of several that were tried, and no other has the same score."""
    ends = (min(scores), max(scores)) if len(scores) > 1 else ()
    return rate in ends and all(score != scores[rate] for other, score in scores.items() if other != rate)


def _short(run: Run, result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in RUN_KEYS if key in result}
