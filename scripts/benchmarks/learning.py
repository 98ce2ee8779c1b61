"""Measure how well block-local learning learns: every row on every task, several seeds, every learning rate tuned.

For each row and number of blocks K, three learning rates are tried with the first seed, the same ones for every row
of a task, and while the best is at the edge of those, up to two beyond it; the best on validation is run with the
other seeds. Test samples are only reported. Every run leaves a file in runs/learning/, so the command can be stopped
and started again. A run that fails is recorded with its error.

    OMP_NUM_THREADS=1 python scripts/benchmarks/learning.py --jobs 2
    OMP_NUM_THREADS=1 python scripts/benchmarks/learning.py --tasks text images --rows pred default --blocks 2
    python scripts/benchmarks/learning.py --size large              # a 120 million parameter language model, on a GPU
    OMP_NUM_THREADS=1 python scripts/benchmarks/learning.py --tasks cipher --update    # one task of the table anew
    OMP_NUM_THREADS=1 python scripts/benchmarks/learning.py --rows "not fine-tuned" pred --tasks text --update
    python scripts/benchmarks/learning.py --plan                    # only say how long it would take
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from common import HERE, parse, prepare, report_path, write_report
from learning_cases import Case, estimate, is_complete, list_cases, missing_runs
from learning_report import draw, markdown
from learning_rows import ROWS, Row
from learning_runs import Run, Store, execute
from learning_summary import summarize
from learning_tasks import SIZES, Task


FOLDER = HERE.parents[1] / "runs" / "learning"


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then write and print the table."""
    options = parse(arguments(), argv)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # trainers take a GPU where they see one
    device = prepare(options)
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))  # for the processes to be started
    start_worker(options.threads)
    store = Store(options.folder / options.size)
    tasks = choose_tasks(options)
    for task in tasks:
        print(f"{task.name}: {store.prepare(task)}", flush=True)
    cases, skipped = list_cases(tasks, choose_rows(options.rows), options.blocks)
    for reason in skipped:
        print(f"skipped  {reason['task']}: {reason['row']}: {reason['reason']}")
    print(estimate(cases, store, options.seeds, options.jobs), flush=True)
    if options.plan:
        return
    if options.made:
        cases = [case for case in cases if is_complete(case, store, options.seeds)]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, context, start_worker, (options.threads,)) as pool:
            run_all(cases, store, pool, seeds=options.seeds, jobs=options.jobs, again=options.again)
    whole = report_path("learning", device, options)
    if options.output is None and not options.update and (options.tasks or options.rows or options.blocks):
        options.output = store.folder / "selection.json"  # the committed file is of the whole
    report = summarize(cases, store, seeds=options.seeds, skipped=skipped)
    if options.update:
        report = put_into(report, whole, cells=bool(options.rows or options.blocks))
    print("\n".join(markdown(report)))
    print(f"\nWritten to {write_report('learning', device, options, report)}")
    if options.plot:
        draw(report, options.plot)


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted({name for tasks in SIZES.values() for name in tasks})
    parser.add_argument("--size", choices=sorted(SIZES), default="small", help="small: CPU. large: one modern GPU.")
    parser.add_argument("--tasks", nargs="+", choices=names, help="Default: all of that size.")
    parser.add_argument("--rows", nargs="+", help=f"Default: all, which are {', '.join(ROWS)} and each task's own.")
    parser.add_argument("--blocks", type=int, nargs="+", help="Default: those of each task.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="The first one tunes the rate.")
    parser.add_argument("--jobs", type=int, default=1, help="Processes at work side by side.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of each process.")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="Default: cuda where there is one.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="Where every run leaves its file.")
    parser.add_argument(
        "--output", type=Path, help="JSON file. Default: results/learning-<cpu|gpu>.json for the whole."
    )
    parser.add_argument("--plot", type=Path, help="Image to draw; needs matplotlib.")
    parser.add_argument("--again", action="store_true", help="Run once more what has failed.")
    parser.add_argument("--made", action="store_true", help="Run nothing: report the cells whose runs are all there.")
    parser.add_argument(
        "--update", action="store_true", help="Put the tasks, or with --rows the cells, into the file of the whole."
    )
    parser.add_argument("--plan", action="store_true", help="Print the estimate and stop.")
    return parser


def put_into(report: dict[str, Any], path: Path, *, cells: bool) -> dict[str, Any]:
    """Return an earlier report with what has been made anew in its place; the command stays that of the whole.

    Args:
        report: What has been made anew.
        path: File of the earlier report.
        cells: Whether single cells are put in, rather than whole tasks. Then the starting model must have the same
            score in both: the samples depend on the installed Python.

    Raises:
        SystemExit: If there is no earlier report, or the two do not go together.
    """
    if not path.is_file():
        raise SystemExit(f"--update needs a report to put things into, and {path} is none. Leave --update out.")
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier["seeds"] != report["seeds"]:
        raise SystemExit(
            f"{path} is of seeds {earlier['seeds']}, not {report['seeds']}. Take those, or leave --update out."
        )
    tasks = dict(earlier["tasks"])
    for name, task in report["tasks"].items():
        if cells and name in tasks:
            if _start_of(task) is None or _start_of(task) != _start_of(tasks[name]):
                raise SystemExit(
                    f"Cells of the task {name!r} can only be put beside others of the same samples and starting "
                    f"model, which the row 'not fine-tuned' tells: {_start_of(tasks[name])} in {path}, "
                    f"{_start_of(task)} here. Add that row to --rows, or make the whole task anew: without --rows and "
                    "--blocks."
                )
            anew = {(case["row"], case["num_blocks"]): case for case in task["cases"]}
            kept = [anew.pop((case["row"], case["num_blocks"]), case) for case in tasks[name]["cases"]]
            order = list(ROWS)
            cases = sorted([*kept, *anew.values()], key=lambda case: (*order, case["row"]).index(case["row"]))
            task = {**tasks[name], "cases": cases}
        tasks[name] = task
    return {**report, "command": earlier["command"], "tasks": tasks}


def _start_of(task: dict[str, Any]) -> list[float] | None:
    """Return the scores of the starting model, None where that has not been scored."""
    runs = [run for case in task["cases"] if case["method"] == "start" for run in case["runs"]]
    return [value for run in runs for value in (run["validation"], run["test"])] or None


def choose_tasks(options: argparse.Namespace) -> list[Task]:
    """Return the tasks that the command line asks for."""
    known = SIZES[options.size]
    unknown = sorted(set(options.tasks or ()) - set(known))
    if unknown:
        raise SystemExit(f"--size {options.size} has no tasks {unknown}. Choose from {sorted(known)}.")
    return [task for name, task in known.items() if not options.tasks or name in options.tasks]


def choose_rows(names: Sequence[str] | None) -> dict[str, Row] | None:
    """Return the rows by name, None for all of them and each task's references."""
    if names is None:
        return None
    references = {
        name: Row(name, "reference") for tasks in SIZES.values() for task in tasks.values() for name in task.references
    }
    known = {**ROWS, **references}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SystemExit(f"There are no rows {unknown}. Choose from {sorted(known)}.")
    return {name: known[name] for name in names}


def run_all(
    cases: Sequence[Case], store: Store, pool: Executor, *, seeds: Sequence[int], jobs: int, again: bool = False
) -> None:
    """Run what is missing, case by case, and save each result as it comes.

    Args:
        cases: What to run.
        store: Where results are.
        pool: Runs `execute`.
        seeds: Seeds; the first one tunes the learning rate.
        jobs: Runs at a time.
        again: Whether to run failed runs once more.
    """
    running: dict[Future[dict[str, Any]], Run] = {}
    started: set[Path] = set()

    def to_start() -> Iterator[Run]:
        for case in cases:
            for run in missing_runs(case, store, seeds, lambda run: again and store.path(run) not in started):
                if store.path(run) not in started:
                    yield run

    while True:
        while len(running) < jobs and (run := next(to_start(), None)) is not None:
            started.add(store.path(run))
            running[pool.submit(execute, run, store.prepare(run.task))] = run
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            run = running.pop(future)
            outcome = outcome_of(future)
            store.save(run, outcome)
            print(f"{run.label:60} {describe(outcome)}", flush=True)


def outcome_of(future: Future[dict[str, Any]]) -> dict[str, Any]:
    """Return what a run came to, or the error that ended it."""
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        raise error  # the machine, not the method
    if error is None:
        return future.result()
    text = "".join(traceback.format_exception(error))
    return {"error": f"{type(error).__name__}: {error}", "traceback": text}


def describe(outcome: dict[str, Any]) -> str:
    """Say in a few words what a run came to."""
    if "error" in outcome:
        return f"failed: {outcome['error'][:100]}"
    seconds = f"  {outcome['cpu_seconds']:.0f} CPU-s" if "cpu_seconds" in outcome else ""
    return f"validation {outcome['validation']:.4f}  test {outcome['test']:.4f}{seconds}"


def start_worker(threads: int) -> None:
    """Make a worker process as quiet and as narrow as the benchmark asks."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
