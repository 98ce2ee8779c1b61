"""The table of what fits into a small GPU, as Markdown."""

from __future__ import annotations

from typing import Any


def small_gpu(report: dict[str, Any], place: str) -> list[str]:
    """The largest batch of each method, and how fast it is trained there."""
    size, plain = report["size"], report["results"][0]
    lines = [
        f"A Llama of {size['layers']} layers, width {size['width']}, {size['vocabulary']:,} tokens, texts of "
        f"{size['sequence']}, AdamW, bf16 autocast, with",
        f"{report['memory_gib']:g} GiB of a GPU ({place}).",
        "",
        "| method | largest batch | x backpropagation | tokens/s there | x backpropagation |",
        "|---|---|---|---|---|",
    ]
    for row in report["results"]:
        rate = row["tokens_per_second"]
        if rate is None:
            lines.append(f"| {row['method']} | none |  |  |  |")
            continue
        ratios = ["", ""]
        if plain["batch"]:
            ratios = [f"{row['batch'] / plain['batch']:.2f}", f"{rate / plain['tokens_per_second']:.2f}"]
        lines.append(f"| {row['method']} | {row['batch']} | {ratios[0]} | {rate:,.0f} | {ratios[1]} |")
    return lines
