"""From the summary of a learning benchmark to Markdown tables and a plot.

Reads nothing but the JSON values that `learning_summary.py` makes, so a committed file is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from statistics import mean, stdev
from typing import Any


EDGE, FEWER = "°", "ᶠ"


def scores(case: Mapping[str, Any], key: str = "test") -> list[float]:
    """Return the scores of a case's runs with the chosen learning rate."""
    return [run[key] for run in case["runs"] if run["chosen"] and run.get(key) is not None]


def markdown(report: Mapping[str, Any]) -> list[str]:
    """Return the tables, one per task, as lines of Markdown."""
    lines: list[str] = []
    for task in report["tasks"].values():
        lines += [*table_of(task, len(report["seeds"])), "", *curves_of(task)]
    lines += [*margins(report), ""]
    lines.append(
        f"Mean ± standard deviation over seeds {', '.join(map(str, report['seeds']))}. {EDGE}: the best learning rate "
        f"is at the edge of all that were tried. {FEWER}: a run with the chosen rate failed."
    )
    if any(case["other_code"] for task in report["tasks"].values() for case in task["cases"]):
        lines.append("Some block-local runs were made with an earlier state of the package.")
    for reason in {(skip["row"], skip["reason"]): skip for skip in report["skipped"]}.values():
        lines.append(f"Skipped: {reason['row']} ({reason['reason']})")
    return lines


# Rows of the short table, and for each task the numbers of blocks that it shows.
HEADLINES = (
    "backpropagation",
    "backpropagation, less below",
    "freeze lower",
    "LoRA",
    "default",
    "default in several processes",
)
SHOWN = {"text": (3,), "language": (2, 4), "images": (2, 4), "reversal": (10, 20), "cipher": (2, 4)}


def headline(report: Mapping[str, Any]) -> list[str]:
    """Return one short table of all tasks, a line per task and K: the means of what a reader asks for first.

    Means with a learning rate at the edge of all that were tried are marked.
    """
    lines = [f"| | | K | {' | '.join(HEADLINES)} |", "|---|" + "---|" * (len(HEADLINES) + 2)]
    for name, counts in SHOWN.items():
        task = report["tasks"][name]
        metric = task["metric"]
        arrow = "↑" if metric["higher_is_better"] else "↓"
        for count in counts:
            cells = {
                case["row"]: format(mean(scores(case)), metric["form"]) + (EDGE if case["at_edge"] else "")
                for case in task["cases"]
                if case["num_blocks"] in (count, None) and scores(case)
            }
            shown = " | ".join(cells.get(row, "") for row in HEADLINES)
            lines.append(f"| {task['title']} | {metric['name']} {arrow} | {count} | {shown} |")
    return lines


def table_of(task: Mapping[str, Any], num_seeds: int) -> list[str]:
    """Return the table of one task: a line per row, a column per number of blocks, and the same for forgetting."""
    blocks = sorted({case["num_blocks"] for case in task["cases"] if case["num_blocks"]}) or [None]
    metric, forgetting = task["metric"], task["forgetting"]
    header = ["", *(f"K = {count}" for count in blocks)]
    if forgetting:
        header += [f"kept, K = {count}" for count in blocks]
    arrow = {True: "higher is better", False: "lower is better"}
    title = f"**{task['title']}**: {metric['name']}, {arrow[metric['higher_is_better']]}"
    if forgetting:
        title += f"; kept: {forgetting['name']}, {arrow[forgetting['higher_is_better']]}"
    lines = [f"{title}.", "", f"| {' | '.join(header)} |", "|---|" + "---|" * (len(header) - 1)]
    for row in dict.fromkeys(case["row"] for case in task["cases"]):
        of_row = {case["num_blocks"]: case for case in task["cases"] if case["row"] == row}
        cells = [cell(of_row.get(count, of_row.get(None)), "test", metric["form"], num_seeds) for count in blocks]
        if forgetting:
            cells += [
                cell(of_row.get(count, of_row.get(None)), "remembered", forgetting["form"], num_seeds)
                for count in blocks
            ]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def margins(report: Mapping[str, Any]) -> list[str]:
    """Return where each block-local row stands between freezing (0) and backpropagation (1), in one table.

    Perplexities are compared by their logarithms. Tasks without a frozen row are left out; where backpropagation is
    not better than freezing there is no margin to share, and the table says so.
    """
    columns: dict[str, dict[str, str]] = {}
    for task in report["tasks"].values():
        values = {
            (case["row"], case["num_blocks"]): (case["method"], _on_scale(mean(scores(case)), task["metric"]))
            for case in task["cases"]
            if scores(case)
        }
        full = next((value for method, value in values.values() if method == "backpropagation"), None)
        frozen = {blocks: value for (_, blocks), (method, value) in values.items() if method == "freeze"}
        for (row, blocks), (method, value) in values.items():
            if method == "local" and full is not None and full != frozen.get(blocks, full):
                share = (value - frozen[blocks]) / (full - frozen[blocks])
                text = f"{share:.2f}" if full > frozen[blocks] else "no margin"
                columns.setdefault(f"{task['title']}, K = {blocks}", {})[row] = text
    if not columns:
        return []
    lines = [
        "**The margin.** What freezing the lower blocks reaches is 0, what backpropagation reaches is 1.",
        "",
        f"|  | {' | '.join(columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    rows = dict.fromkeys(row for column in columns.values() for row in column)
    return lines + [f"| {row} | {' | '.join(column.get(row, '') for column in columns.values())} |" for row in rows]


def _on_scale(score: float, metric: Mapping[str, Any]) -> float:
    return score if metric["higher_is_better"] else -log(score)


def curves_of(task: Mapping[str, Any]) -> list[str]:
    """Return how far each row was in the course of training, for a task that records it: means over seeds."""
    lines = []
    for case in task["cases"]:
        curves = [run["curve"] for run in case["runs"] if run["chosen"] and run.get("curve")]
        if not curves:
            continue
        steps = [step for step, _ in curves[0]][1::2]
        if not lines:
            lines = [f"| step | {' | '.join(map(str, steps))} |", "|---|" + "---|" * len(steps)]
        means = [mean(dict(curve)[step] for curve in curves) for step in steps]
        cut = f", K = {case['num_blocks']}" if case["num_blocks"] else ""
        lines.append(f"| {case['row']}{cut} | {' | '.join(format(m, task['metric']['form']) for m in means)} |")
    return [*lines, ""] if lines else []


def cell(case: Mapping[str, Any] | None, key: str, form: str, num_seeds: int) -> str:
    """Return one cell: mean and spread, with a mark where either is not to be taken at its word."""
    if case is None or not case["runs"]:
        return ""
    values = scores(case, key)
    if not values:
        failed = key == "test" and any("error" in run for run in case["runs"])
        return "failed" if failed else "-"
    text = format(mean(values), form)
    if len(values) > 1:
        text += f" ± {format(stdev(values), form)}"
    if key == "test":
        learns = case["rate"] is not None
        text += (EDGE if case["at_edge"] else "") + (FEWER if learns and len(values) < num_seeds else "")
    return text


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Plot each task's metric against the number of blocks, with backpropagation and freezing as lines.

    Raises:
        SystemExit: If matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ModuleNotFoundError:
        raise SystemExit(
            "--plot needs matplotlib: pip install 'hf-blocklocal[plots]'. The table is written already."
        ) from None
    tasks = list(report["tasks"].values())
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 3.8), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for row in dict.fromkeys(case["row"] for case in task["cases"]):
            _draw_row(axis, row, [case for case in task["cases"] if case["row"] == row and scores(case)])
        axis.set(title=task["title"], xlabel="blocks K", ylabel=task["metric"]["name"], xticks=task["blocks"])
        axis.title.set_fontsize(9)
        if not task["metric"]["higher_is_better"]:
            axis.set_yscale("log")
    handles = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=5, fontsize=7)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_row(axis: Any, row: str, cases: Sequence[Mapping[str, Any]]) -> None:
    # The starting model and perplexities of thousands would press all else together.
    if not cases or cases[0]["method"] == "start":
        return
    means = [mean(scores(case)) for case in cases]
    if cases[0]["num_blocks"] is None:
        style = {"backpropagation": ("black", "-"), "lora": ("grey", ":")}
        color, line = style.get(cases[0]["method"], ("lightgrey", "-."))
        axis.axhline(means[0], color=color, linestyle=line, label=row)
        return
    low = [value - min(scores(case)) for value, case in zip(means, cases, strict=True)]
    high = [max(scores(case)) - value for value, case in zip(means, cases, strict=True)]
    extra = {"color": "black", "linestyle": "--"} if cases[0]["method"] == "freeze" else {}
    blocks = [case["num_blocks"] for case in cases]
    axis.errorbar(blocks, means, yerr=[low, high], marker="o", markersize=3, capsize=2, label=row, **extra)
