"""The tables of what was seen on a GPU, as Markdown."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any


def small_gpu(report: dict[str, Any], place: str) -> list[str]:
    """The largest batch of each method, and how fast it is trained there."""
    sys.path.insert(0, str(Path(__file__).parent))
    from small_gpu import HEADER, cells

    size, rows = report["size"], report["results"]
    return [
        f"A Llama of {size['layers']} layers, width {size['width']}, {size['vocabulary']:,} tokens, texts of "
        f"{size['sequence']}, AdamW, bf16 autocast, with",
        f"{report['memory_gib']:g} GiB of a GPU ({place}).",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
        *(f"| {' | '.join(cells(row, rows[0]))} |" for row in rows),
    ]


def parts_of_a_gpu(report: dict[str, Any], place: str) -> list[str]:
    """Throughput where every process has the same part of one GPU."""
    size, rounds = report["size"], report["rounds"]
    model = f"A BERT of {size['layers']} layers, width {size['width']}, batches of {size['batch']}"
    steps = f"{report['steps']} steps, {rounds} {'round' if rounds == 1 else 'rounds'}"
    lines = [
        f"{model} x {size['sequence']} tokens, heads of their own, bf16 autocast,",
        f"an optimizer step per batch; {steps}; each process with {report['gpu_percentage']} % of a GPU,",
        f"messages by {report['backend']}",
        f"({place}).",
        "",
        "| | samples/s | x one process | time waited, by block |",
        "|---|---|---|---|",
    ]
    for row in report["results"]:
        ratio = median(row[f"times {row['beside']}"]["wall"])
        waited = ", ".join(f"{share:.0%}" for share in row["waited"]) if "block-local" in row["way"] else ""
        lines.append(f"| {row['way']} | {row['samples_per_second']:.1f} | {ratio:.2f} | {waited} |")
    return lines
