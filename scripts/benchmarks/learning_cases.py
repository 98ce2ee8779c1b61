"""The cells of the learning table: a row on a task with K blocks, and which runs each still needs.

A learning rate is chosen from a grid that is the same for every row of a task. Where the best lies at an edge of it,
the grid goes on beyond that edge, for this cell alone and by the same rule for every row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite

from learning_rows import ROWS, Row
from learning_runs import Run, Store
from learning_tasks import Task


WIDENINGS = 2  # rates that a cell may try beyond the grid of its task
FAILED = (-inf, 0.0)


@dataclass(frozen=True)
class Case:
    """A row on a task with a number of blocks: what gets one cell of the table."""

    task: Task
    row: Row
    num_blocks: int | None

    def grid(self, store: Store, seed: int) -> list[Run]:
        """Return the runs among which the learning rate is chosen, by ascending rate, as far as is known by now.

        These are those of the task, and once they have been made, while one at an edge is better than all others, one
        beyond it.
        """
        rates = self.task.rates if self.row.learns else (None,)
        runs = [self._run(rate, seed) for rate in rates]
        for _ in range(WIDENINGS if len(runs) > 1 else 0):
            if any(store.load(run) is None for run in runs):
                break
            ranks = [rank(run, store) for run in runs]
            if ranks[0] > max(ranks[1:]):
                runs.insert(0, self._run(beyond(runs[1].rate, runs[0].rate), seed))
            elif ranks[-1] > max(ranks[:-1]):
                runs.append(self._run(beyond(runs[-2].rate, runs[-1].rate), seed))
            else:
                break
        return runs

    def repeats(self, rate: float | None, seeds: Sequence[int]) -> list[Run]:
        """Return the runs with the chosen rate and the other seeds."""
        return [self._run(rate, seed) for seed in seeds if self.row.learns]

    def _run(self, rate: float | None, seed: int) -> Run:
        return Run(self.task, self.row, self.num_blocks, rate, seed)


def beyond(inner: float, edge: float) -> float:
    """Return the rate that is as far from the edge of a grid as the edge is from its neighbour, to two digits."""
    return float(f"{edge * edge / inner:.2g}")


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
    """Return the runs of a case that can be started now: the grid, or once its best is inside it the other seeds."""

    def is_missing(run: Run) -> bool:
        result = store.load(run)
        return result is None or ("error" in result and failed_too(run))

    missing = [run for run in case.grid(store, seeds[0]) if is_missing(run)]
    if missing:
        return missing
    best = best_run(case, store, seeds[0])
    return [] if best is None else [run for run in case.repeats(best.rate, seeds[1:]) if is_missing(run)]


def is_complete(case: Case, store: Store, seeds: Sequence[int]) -> bool:
    """Tell whether every run of a case has been made, and one of them has not failed."""
    return not missing_runs(case, store, seeds, lambda run: False) and best_run(case, store, seeds[0]) is not None


def best_run(case: Case, store: Store, seed: int) -> Run | None:
    """Return the run of the grid that is best on validation, the first of equals; None if all have failed."""
    best = max(case.grid(store, seed), key=lambda run: rank(run, store))
    return best if rank(best, store) > FAILED else None


def rank(run: Run, store: Store) -> tuple[float, float]:
    """Return what runs are ordered by: the validation score, more being better; `FAILED` without a finite one.

    Where several are perfect, the one that became so first is ahead: the one with the larger area under its curve.
    """
    result = store.load(run) or {}
    score = result.get("validation")
    if score is None or not isfinite(score):
        return FAILED
    sign = 1 if run.task.metric.higher_is_better else -1
    return sign * score, sign * sum(value for _, value in result.get("curve", ()))


def estimate(cases: Sequence[Case], store: Store, seeds: Sequence[int], jobs: int) -> str:
    """Say how many runs are missing and how long they take, without rates beyond the grid that may follow."""
    total, seconds = 0, 0.0
    for case in cases:
        left = sum(store.load(run) is None for run in case.grid(store, seeds[0]))
        best = None if left else best_run(case, store, seeds[0])
        if left or best:  # where the whole grid has failed, nothing follows
            repeats = case.repeats(best.rate if best else None, seeds[1:])
            left += sum(best is None or store.load(run) is None for run in repeats)
        total += left
        seconds += left * case.task.seconds
    return f"{total} runs to make, about {seconds / jobs / 60:.0f} minutes with {jobs} at a time."
