"""The tables of what was seen on a GPU, as Markdown."""

from __future__ import annotations

from statistics import median
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


def parts_of_a_gpu(report: dict[str, Any], place: str) -> list[str]:
    """Throughput where every process has the same part of one GPU."""
    size, rounds = report["size"], report["rounds"]
    how = "NCCL" if report.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1" else "gloo"
    part = report.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "100")
    model = f"A BERT of {size['layers']} layers, width {size['width']}, batches of {size['batch']}"
    steps = f"{report['steps']} steps, {rounds} {'round' if rounds == 1 else 'rounds'}"
    lines = [
        f"{model} x {size['sequence']} tokens, heads of their own, bf16 autocast,",
        f"an optimizer step per batch; {steps}; each process with {part} % of the GPU, and",
        f"messages by {how}",
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
