"""The tables of training on several devices, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any


_NOTES = {
    "default heads": (
        "Default heads train a copy of a layer, in one process here as in two, where it makes the first block the "
        "larger\none; their ratios are to one process with such heads."
    ),
    "a layer more": (
        "Where the model has a layer more and is cut by cost, blocks are equal: five layers of ten, the copy among "
        "them."
    ),
    "lens heads": "Lens heads train copies of the task head alone; their ratios are to one process with such heads.",
}


def block_parallel(report: dict[str, Any], place: str) -> list[str]:
    """Throughput of a block per process beside the other ways of training."""
    size, one = report["size"], "block-local, one process"
    notes = [note for kind, note in _NOTES.items() if any(kind in row["way"] for row in report["results"])]
    heads = "heads of their own if nothing else is said" if notes else "heads of their own"
    lines = [
        f"**Throughput** of a BERT of {size['layers']} layers, width {size['width']}, batches of {size['batch']} x",
        f"{size['sequence']} tokens, {heads}, an optimizer step per batch; median [range] of",
        f"{report['rounds']} rounds;",
        f"{place.replace(', one run', '')}.",
        "The first ratio is of wall time on these cores, the second of processor time in the busiest process: what",
        "processes with a core each would reach if none waited.",
        *notes,
        "",
        "| | samples/s | x one process, wall | x one process, processor time | time waited, by block |",
        "|---|---|---|---|---|",
    ]
    for row in report["results"]:
        times = row[f"times {row.get('beside', one)}"]
        ratios = [f"{median(times[clock]):.2f} {_range(times[clock])}" for clock in ("wall", "processor")]
        waited = ", ".join(f"{share:.0%}" for share in row["waited"]) if "block-local" in row["way"] else ""
        lines.append(f"| {row['way']} | {row['samples_per_second']:.1f} | {ratios[0]} | {ratios[1]} | {waited} |")
    return lines


def _range(values: Sequence[float]) -> str:
    return f"[{min(values):.2f}-{max(values):.2f}]"


def pipelining(report: dict[str, Any], place: str) -> list[str]:
    """Measured utilisation of emulated devices by schedule and micro-batches."""
    settings, rows = report["settings"], report["rows"]
    link = 8 * settings["megabytes"] * 2**20 / settings["gigabits"] / 1e6
    lines = [
        "**Measured on emulated devices**: utilisation, the share of time in which the ranks compute the model's own",
        f"passes, of K ranks with m micro-batches a batch; median of {settings['rounds']} rounds. A process per rank,",
        f"messages of {settings['megabytes']:g} MB over gloo, passes of {settings['seconds'] * 1e3:g} ms slept, a",
        f"block-local head of {settings['head']:.0%} of its block if nothing else is said, an optimizer step per",
        "batch;",
        f"{place.replace(', one run', '')}.",
        f"Over the slow link, {settings['gigabits']:g} Gb/s, a message is {link:.0f} ms under way.",
        "Empty where torch refuses so few micro-batches; with a single one, 1F1B does what GPipe does.",
        "",
    ]
    counts = sorted({row["m"] for row in rows})
    for blocks in sorted({row["K"] for row in rows}):
        mine = [row for row in rows if row["K"] == blocks]
        shares = {(row["schedule"], row["m"]): row["utilisation"] for row in mine}
        stream = shares["block-local", 1]
        # A stream steps after every micro-batch, so it is the same at any number of them.
        lines += [
            f"| K = {blocks} | {' | '.join(f'm = {count}' for count in counts)} |",
            f"|---|{'---|' * len(counts)}",
        ]
        for name in dict.fromkeys(row["schedule"] for row in mine):
            streams = name.startswith("block-local")
            given = [shares[name, 1 if streams else count] for count in counts]
            ahead = [value is not None and value > stream and not streams for value in given]
            cells = [_cell(value, bold=bold) for value, bold in zip(given, ahead, strict=True)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return [*lines, f"Schedules that are ahead of block-local with heads of {settings['head']:.0%} are bold."]


def loading(report: dict[str, Any], place: str) -> list[str]:
    """What processes of one machine own of a model, from loading to a step."""
    size, weights = report["size"], report["model_bytes"]
    moments = ("loaded", "set up", "one step")
    lines = [
        "**Loading.** Main memory that a process alone owns, as a share of the weights of a Llama of",
        f"{size['layers']} layers and {weights / 2**20:.0f} MiB, with heads of their own and SGD; pages of the",
        f"file that processes share are not counted; {place}.",
        "",
        f"| processes | block | {' | '.join(moments)} |",
        f"|---|---|{'---|' * len(moments)}",
    ]
    for each in report["results"]:
        for block, told in enumerate(each["by_block"]):
            cells = " | ".join(f"{told[moment]['own'] / weights:.2f}" for moment in moments)
            lines.append(f"| {each['processes']} | {block if each['processes'] > 1 else 'all'} | {cells} |")
    return lines


PIPELINES = ("1F1B", "interleaved", "ZB-H1")


def scale(report: dict[str, Any], place: str) -> list[str]:
    """Simulated efficiency by ranks, micro-batches and link; where a pipeline is ahead, it is marked."""
    settings = report["settings"]
    lines = [
        f"**Simulated** by `{report['command']}`: time of the model's own passes as a share of the ranks'",
        "time, with K ranks and m micro-batches per optimizer step.",
        "Forward pass, input gradient and weight gradient take equally long, an optimizer step takes",
        f"{settings['optimizer']} of a forward pass, and a block-local head costs {settings['head']:.0%} of its",
        "block. The best is bold. GPipe is as 1F1B here; an interleaved schedule needs a multiple of K micro-batches,",
        "ZB-H1 at least K.",
        "",
        "![efficiency by ranks](../scripts/benchmarks/results/scale.png)",
        "",
        *_efficiencies([row for row in report["ranks"] if row["K"] in (2, 4, 8, 64) and row["m"] != 4], ()),
        "",
        f"The same with the messages of a {settings['layers']}-layer model of width 4096, a sequence of 2048 each:",
        "",
        *_efficiencies([row for row in report["links"] if row["K"] < 64], ("link",)),
        "",
        "Eight ranks whose pace varies (standard deviation of the logarithm), by messages that may wait between two,",
        "heads and optimizer left out:",
        "",
        *_table(report["jitter"]),
        "",
        "A collective of all ranks, such as a global gradient norm, puts the bubble back (heads, optimizer left out):",
        "",
        *_table(report["barriers"]),
        "",
        "Eight ranks of which the last is slower by the first column, as a language-model head makes it (heads and",
        "optimizer left out):",
        "",
        *_table(report["imbalance"]),
    ]
    return lines + _measured(report.get("measured", ()))


def _measured(points: Sequence[dict[str, Any]]) -> list[str]:
    """Say how far the simulator was from what was measured."""
    if not points:
        return []
    within = sum(point["within 10 %"] for point in points)
    real = sum(bool(point["work"]["pace"]) for point in points)
    emulated = len(points) - real  # devices that are all alike
    lines = [
        "",
        f"{within} of {len(points)} measured steps, {emulated} on emulated devices and {real} of real training,",
        "are within 10 % of what the simulator says; the last column is how far it is off:",
        "",
        "| | K | m | simulated, ms | measured, ms | |",
        "|---|---|---|---|---|---|",
    ]
    for point in points:
        times = " | ".join(f"{1e3 * point[f'{kind} s']:.0f}" for kind in ("simulated", "measured"))
        mark = "" if point["within 10 %"] else " !"
        lines.append(
            f"| {point['schedule']} | {point['K']} | {point['m']} | {times} | {point['deviation']:+.1%}{mark} |"
        )
    return lines


def _efficiencies(rows: Sequence[dict[str, Any]], first: tuple[str, ...]) -> list[str]:
    shown = (*PIPELINES, "block-local")
    lines = [f"| {' | '.join((*first, 'K', 'm', *shown))} |", f"|{'---|' * (len(first) + 2 + len(shown))}"]
    for row in rows:
        best = max(row[each] for each in shown if row[each] is not None)
        cells = [_cell(row[each], bold=row[each] == best) for each in shown]
        lines.append(f"| {' | '.join([*(row[each] for each in first), str(row['K']), str(row['m']), *cells])} |")
    return lines


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return lines + [
        f"| {' | '.join([str(row[names[0]]), *(_cell(row[name]) for name in names[1:])])} |" for row in rows
    ]


def _cell(value: float | None, *, bold: bool = False) -> str:
    if value is None:
        return ""
    return f"**{value:.2f}**" if bold else f"{value:.2f}"
