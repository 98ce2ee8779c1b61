"""Print the tables of README.md and docs/ from the committed results, so that no number is copied by hand.

To print them:              python scripts/benchmarks/readme.py
To put them in their place: python scripts/benchmarks/readme.py --write
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from readme_gpu import parts_of_a_gpu, small_gpu
from readme_scaling import block_parallel, loading, pipelining, scale


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the sections, or put each between its marks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="Change the pages.")
    write = parser.parse_args(argv).write
    for name, text in sections().items():
        if write:
            page = page_of(name)
            before = page.read_text(encoding="utf-8")
            old = f"{start(name)}{between(before, name)}{END}"
            page.write_text(before.replace(old, f"{start(name)}{text}{END}"), encoding="utf-8")
        else:
            print(text)


def start(name: str) -> str:
    """Return the mark in front of a section."""
    return f"<!-- {name} -->\n"


END = "<!-- end -->"


def page_of(name: str) -> Path:
    """Return the one page that has a section."""
    (page,) = (page for page in PAGES if start(name) in page.read_text(encoding="utf-8"))
    return page


def between(page: str, name: str) -> str:
    """Return what stands between the marks of a section."""
    return page.split(start(name))[1].split(END)[0]


def sections() -> dict[str, str]:
    """Return every section as Markdown, by name."""
    sys.path.insert(0, str(HERE.parent))
    from tasks.table import tasks_table

    benchmarks = [*memory(load("memory-cpu")), "", *step_time(load("step_time-cpu")), "", *share()]
    result = {
        "quickstart": quickstart(load("quickstart-cpu")),
        "benchmarks": benchmarks,
        "tasks": tasks_table(ROOT / "configs" / "train"),
        "assisted": assisted(load("assisted_generation-cpu")),
        "models": models(load("supported_models")),
    }
    for section, (name, table) in WITH_PLACE.items():
        if (HERE / "results" / f"{name}.json").is_file():
            result[section] = table(*_with_place(name))
    for section, (name, table) in OTHERS.items():
        if (HERE / "results" / f"{name}.json").is_file():
            result[section] = table(load(name))
    return {section: "\n".join(lines) + "\n" for section, lines in result.items()}


def quickstart(report: dict[str, Any]) -> list[str]:
    """The table that `make quickstart` ends with."""
    sys.path.insert(0, str(HERE.parent))
    from recipes import Outcome
    from reporting import report as table

    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return [
        f"`make quickstart` ends with this table (one run, {report['cores']} CPU cores, {versions}):",
        "",
        "```",
        *table([Outcome(**outcome) for outcome in report["outcomes"]]).splitlines(),
        "```",
    ]


def load(name: str) -> dict[str, Any]:
    """Read the results of one benchmark."""
    return json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))


def where(report: dict[str, Any]) -> str:
    """Say in one line where and with what a benchmark was run."""
    machine, versions = report["machine"], report["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    if machine["gpu"]:
        return f"`{report['command']}`, one run on one {machine['gpu']}, {packages}"
    cores, threads = machine["cores"], machine["threads"]
    return f"`{report['command']}`, one run on {cores} shared CPU cores, {threads} thread, {packages}"


def _with_place(name: str) -> tuple[dict[str, Any], str]:
    report = load(name)
    return report, where(report)


def learning(report: dict[str, Any]) -> list[str]:
    """How well block-local learning learns, task by task; on a GPU too, where that has been run."""
    sys.path.insert(0, str(HERE))
    from learning_report import markdown

    lines = [f"**Learning.** Measured by {where(report).replace(', one run', '')}.", "", *markdown(report)]
    if (HERE / "results" / "learning-gpu.json").is_file():
        large = load("learning-gpu")
        lines += ["", f"Larger, by `{large['command']}` on one {large['machine']['gpu']}:", "", *markdown(large)]
    return lines


def learning_summary(report: dict[str, Any]) -> list[str]:
    """The rows of the learning benchmark that a reader asks for first."""
    sys.path.insert(0, str(HERE))
    from learning_report import EDGE, headline

    seeds, table = len(report["seeds"]), headline(report)
    marked = (
        f" {EDGE}: the best rate is at the edge of all that were tried." if any(EDGE in row for row in table) else ""
    )
    return [
        f"Means of {seeds} seeds (`{report['command']}`), every learning rate tuned. K is the number of blocks;",
        "*less below* is with the rates that blocks have by default, and *freeze lower* is the plain `Trainer` on the",
        f"last of them and the task head alone.{marked}",
        "",
        *table,
    ]


def models(report: dict[str, Any]) -> list[str]:
    """Which architectures are supported, and why the others are refused."""
    rows = report["rows"]
    supported = [row for row in rows if row["reason"] is None]
    versions = " and ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"{len(supported)} of {len(rows)} architectures pass (`{report['command']}`,",
        f"{versions}); `tests/test_models.py` runs the same checks.",
        "",
        "<details><summary>Which they are, and why the others are refused</summary>",
        "",
        "|  | supported |",
        "|---|---|",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        names = sorted(f"{row['name']}{_marks(row)}" for row in supported if row["kind"] == kind)
        lines.append(f"| {kind} ({len(names)}) | {', '.join(names)} |")
    lines += ["", "°: with `model.config.use_cache = False`, because it keeps its state between passes."]
    if not all(row["exact"] for row in supported):
        lines[-1] += " ~: logits within 1e-5."
    lines += ["", "| refused | because |", "|---|---|"]
    lines += [f"| {row['name']} | {row['reason']} |" for row in rows if row["reason"] is not None]
    return [*lines, "", "</details>"]


def _marks(row: dict[str, Any]) -> str:
    return ("°" if row["needs"] else "") + ("" if row["exact"] else "~")


def memory(report: dict[str, Any]) -> list[str]:
    """Peak bytes of one training step as a share of the plain Trainer's."""
    rows = {(row["model"], row["method"]): row for row in report["rows"]}
    models = list(dict.fromkeys(model for model, _ in rows))
    heads = {"borrow layers (default)": "", "their own (`head_layers=0`)": ", heads of their own"}
    methods = ["K=2", "K=4", "K=12", "K=4, balance=cost", "K=4, chunked_loss=64"]
    lines = [
        "**Memory.** Peak bytes that autograd saves for backward, heads and losses included, as a share of the plain",
        f"`Trainer`'s; random weights ({where(report)}). The target is 1/K + 0.10; what misses it is marked !.",
        "",
        f"| 12 layers | heads | {' | '.join(methods)} |",
        f"|---|---|{'---|' * len(methods)}",
    ]
    for model in models:
        for kind, ending in heads.items():
            shares = [rows.get((model, f"{method}{ending}")) for method in methods]
            cells = ["" if row is None else f"{row['shares']['saved']:.2f}{_mark(row)}" for row in shares]
            lines.append(f"| {model} | {kind} | {' | '.join(cells)} |")
    lines += [
        "",
        "All live tensors at their peak, gradients included, as a share of the plain `Trainer`'s:",
        "",
    ]
    both = "K=4, step_per_block, gradient checkpointing"
    methods = {
        "gradient checkpointing": "gradient checkpointing",
        "K=4": "K=4",
        "K=4, step_per_block": "K=4, `step_per_block=True`",
        both: "the same, gradient checkpointing",
        f"{both}, chunked_loss=64": "the same, `chunked_loss=64`",
    }
    methods = {name: title for name, title in methods.items() if any(method == name for _, method in rows)}
    lines += [f"| 12 layers | heads | {' | '.join(methods.values())} |", f"|---|---|{'---|' * len(methods)}"]
    for model in models:
        for kind, ending in heads.items():
            endings = [name if name == "gradient checkpointing" else f"{name}{ending}" for name in methods]
            found = [rows.get((model, name)) for name in endings]
            cells = ["" if row is None else format(row["shares"]["with_gradients"], ".2f") for row in found]
            lines.append(f"| {model} | {kind} | {' | '.join(cells)} |")
    return lines


def _mark(row: dict[str, Any]) -> str:
    return "" if row["target_met"] else " !"


def step_time(report: dict[str, Any]) -> list[str]:
    """Time of a step relative to the plain Trainer's."""
    rounds = len(report["results"][0]["wall"]["ratios"])
    lines = [
        "**Time.** A whole training step, optimizer included, relative to the plain `Trainer` in the same round:",
        f"median [range] of {rounds} paired rounds ({where(report)}). The target is 1.10.",
        "",
        "| 12 layers | method | step time |",
        "|---|---|---|",
    ]
    for row in report["results"]:
        ratios = row["wall"]["ratios"]
        spread = f"{row['wall']['ratio']:.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"
        if row["method"] != "backpropagation":
            missed = " !" if row["target_met"] is False else ""
            lines.append(f"| {row['model']} | {row['method']} | {spread}{missed} |")
    return lines


def assisted(report: dict[str, Any]) -> list[str]:
    """What first blocks are worth as drafts of assisted generation."""
    sys.path.insert(0, str(HERE))
    from assisted_generation import HEADER, cells

    return [
        f"**Assisted generation** by a small Llama of {report['layers']} layers, trained in four blocks",
        f"({where(report)}). Speed-up against greedy decoding: median [range] of",
        f"{len(report['results'][0]['speed_ups'])} paired rounds. Below 1, drafting costs more than it saves.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
        *(f"| {' | '.join(cells(row))} |" for row in report["results"]),
    ]


def lora(report: dict[str, Any]) -> list[str]:
    """Adapters beside all weights, block by block and as a whole."""
    sys.path.insert(0, str(HERE))
    from lora import HEADER, cells

    settings, rows = report["settings"], report["rows"]
    spread = max(max(row["seconds"]) / min(row["seconds"]) for row in rows)
    return [
        f"MiniLM, docstrings to chapters, K = {settings['blocks']}, {settings['texts']} texts, "
        f"{settings['budget']['num_train_epochs']} epochs",
        f"({where(report).replace(', one run', '')}). Mean ± standard deviation",
        f"over {settings['seeds']} seeds. °: the best learning rate is at the edge of the grid.",
        f"Train times of one row differ by up to {spread:.1f} times{': read them as rough' if spread > 1.5 else ''}.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
        *(f"| {' | '.join(cells(row))} |" for row in rows),
    ]


def share() -> list[str]:
    """What the heads add."""
    report = load("feedback_share-cpu")
    lines = [
        f"**Heads of their own.** Their share at K = {report['num_blocks']} (`{report['command']}`; counted,",
        "not timed). The target is 5 % each.",
        "",
        "| model | parameters | operations of a step |",
        "|---|---|---|",
    ]
    for row in report["results"]:
        lines.append(f"| {row['case']['name']} | {row['parameter_share']:.2%} | {row['operation_share']:.2%} |")
    return lines


# What has been measured, if it has: its results, and what makes a table of them.
WITH_PLACE = {
    "block_parallel": ("block_parallel-cpu", block_parallel),
    "pipelining": ("pipelining-cpu", pipelining),
    "scale": ("scale-cpu", scale),
    "loading": ("loading-cpu", loading),
    "small_gpu": ("small_gpu-gpu", small_gpu),
    "block_parallel_gpu": ("block_parallel-gpu", parts_of_a_gpu),
}
OTHERS = {
    "lora": ("lora-cpu", lora),
    "memory_gpu": ("memory-gpu", memory),
    "step_time_gpu": ("step_time-gpu", step_time),
    "learning": ("learning-cpu", learning),
    "learning_summary": ("learning-cpu", learning_summary),
}


if __name__ == "__main__":
    main()
