"""The cells of the learning table: a row on a task with K blocks, and which runs each still needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from learning_rows import ROWS, Row
from learning_runs import Run, Store
from learning_tasks import Task


@dataclass(frozen=True)
class Case:
    """A row on a task with a number of blocks: what gets one cell of the table."""

    task: Task
    row: Row
    num_blocks: int | None

    def grid(self, seed: int) -> list[Run]:
        """Return the runs among which the learning rate is chosen."""
        rates = self.task.rates if self.row.learns else (None,)
        return [Run(self.task, self.row, self.num_blocks, rate, seed) for rate in rates]

    def repeats(self, rate: float | None, seeds: Sequence[int]) -> list[Run]:
        """Return the runs with the chosen rate and the other seeds."""
        return [Run(self.task, self.row, self.num_blocks, rate, seed) for seed in seeds if self.row.learns]


def list_cases(
    tasks: Sequence[Task], rows: Mapping[str, Row] | None, blocks: Sequence[int] | None
) -> tuple[list[Case], list[dict[str, str]]]:
    """Pair tasks, rows and numbers of blocks.

    Returns:
        The cases, and why rows that the package does not know (yet) were skipped.
    """
    from hf_blocklocal.errors import ConfigError

    cases, skipped = [], []
    for task in tasks:
        of_task = {**ROWS, **{name: Row(name, "reference") for name in task.references}}
        for row in (of_task if rows is None else rows).values():
            if (row.needs_pretraining and not task.pretrained) or (
                row.method == "reference" and row.name not in task.references
            ):
                continue
            try:
                for num_blocks in (blocks or task.blocks) if row.depends_on_blocks else (None,):
                    row.settings(num_blocks, single_stack=task.single_stack, pretrained=task.pretrained)
                    cases.append(Case(task, row, num_blocks))
            except ConfigError as error:
                skipped.append({"task": task.name, "row": row.name, "reason": str(error)})
    return cases, skipped


def missing_runs(case: Case, store: Store, seeds: Sequence[int], failed_too: Callable[[Run], bool]) -> list[Run]:
    """Return the runs of a case that can be started now: the grid, or once that is complete the other seeds."""

    def is_missing(run: Run) -> bool:
        result = store.load(run)
        return result is None or ("error" in result and failed_too(run))

    grid = case.grid(seeds[0])
    missing = [run for run in grid if is_missing(run)]
    if missing:
        return missing
    best = best_run(case, store, seeds[0])
    return [] if best is None else [run for run in case.repeats(best.rate, seeds[1:]) if is_missing(run)]


def is_complete(case: Case, store: Store, seeds: Sequence[int]) -> bool:
    """Tell whether every run of a case has been made, and one of them has not failed."""
    return not missing_runs(case, store, seeds, lambda run: False) and best_run(case, store, seeds[0]) is not None


def best_run(case: Case, store: Store, seed: int) -> Run | None:
    """Return the run of the grid that is best on validation, None if all have failed.

    Where several are perfect, the one that became so first is best: the one with the larger area under its curve.
    """
    best, best_score = None, (0.0, 0.0)
    sign = 1 if case.task.metric.higher_is_better else -1
    for run in case.grid(seed):
        result = store.load(run) or {}
        score = result.get("validation")
        if score is None or not isfinite(score):
            continue
        ranked = (sign * score, sign * sum(value for _, value in result.get("curve", ())))
        if best is None or ranked > best_score:
            best, best_score = run, ranked
    return best


def estimate(cases: Sequence[Case], store: Store, seeds: Sequence[int], jobs: int) -> str:
    """Say how many runs are missing and how long they take."""
    total, seconds = 0, 0.0
    for case in cases:
        left = sum(store.load(run) is None for run in case.grid(seeds[0]))
        best = None if left else best_run(case, store, seeds[0])
        if left or best:  # where the whole grid has failed, nothing follows
            repeats = case.repeats(best.rate if best else None, seeds[1:])
            left += sum(best is None or store.load(run) is None for run in repeats)
        total += left
        seconds += left * case.task.seconds
    return f"{total} runs to make, about {seconds / jobs / 60:.0f} minutes with {jobs} at a time."
