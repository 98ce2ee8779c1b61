"""Find out how large a batch fits into a small GPU: block-local learning, backpropagation, checkpointing, LoRA.

Takes a large GPU and allows torch a part of its memory, 16 GiB by default. Every method trains the same Llama-like
model in bfloat16 autocast, with AdamW. Its batch is doubled until memory runs out, and what lies between is halved a
few times: what is told is the largest batch that has been trained, to an eighth, and the tokens per second there.

    python scripts/benchmarks/small_gpu.py
    python scripts/benchmarks/small_gpu.py --memory 24 --layers 32 --width 1536
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from statistics import median
from typing import Any

from common import (
    Size,
    build_examples,
    build_model,
    build_trainer,
    chosen_size,
    parse,
    parser,
    prepare,
    print_table,
    write_report,
)
from step_time import stamp_steps_


# Its batch is the one that is tried first.
SIZE = Size(layers=24, width=1024, vocabulary=32_000, batch=4, sequence=512)
# Steps of a trial; the first makes the state of the optimizer, and is not timed.
STEPS = 4
CHUNK = 1024
PLAIN = "backpropagation"
HEADER = ("method", "largest batch", "x backpropagation", "tokens/s there", "x backpropagation")
LORA = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def main(argv: Sequence[str] | None = None) -> None:
    """Look for the largest batch of every method, print a table, write it as JSON."""
    arguments = parser("Largest batch on a small GPU.", cuda=SIZE)
    arguments.add_argument("--memory", type=float, default=16, help="GiB of the GPU that may be used.")
    arguments.add_argument("--blocks", type=int, nargs="+", default=[4], help="Numbers of blocks K.")
    options = parse(arguments, argv)
    size = chosen_size(options, SIZE)
    if prepare(options) != "cuda":
        raise SystemExit("scripts/benchmarks/small_gpu.py measures the memory of a GPU, and there is none here.")
    import torch

    torch.cuda.set_per_process_memory_fraction(options.memory * 2**30 / torch.cuda.mem_get_info()[1])
    results = []
    for method, settings in methods(options.blocks).items():
        results.append({"method": method, **largest(size, settings)})
        print(f"{method}: {results[-1]['batch']}", flush=True)
    print_table(HEADER, [cells(row, results[0]) for row in results], left=1)
    report = {"size": size, "memory_gib": options.memory, "results": results}
    print(f"\nWritten to {write_report('small_gpu', 'cuda', options, report)}")


def methods(blocks: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return the settings of every method, by name; backpropagation first."""
    own = {"head_layers": 0}
    lean = {**own, "step_per_block": True, "chunked_loss": CHUNK}
    every: dict[str, dict[str, Any]] = {
        PLAIN: {"block_local": None},
        "gradient checkpointing": {"block_local": None, "checkpointing": True},
        "LoRA": {"block_local": None, "lora": True},
    }
    for count in blocks:
        name, fields = f"K={count}", {"num_blocks": count}
        every[name] = {"block_local": fields}
        every[f"{name}, heads of their own"] = {"block_local": fields | own}
        every[f"{name}, heads of their own, step_per_block, chunked_loss"] = {"block_local": fields | lean}
        every[f"{name}, the same, gradient checkpointing"] = {"block_local": fields | lean, "checkpointing": True}
    return every


def largest(size: Size, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the largest batch that fits, and the tokens per second there."""
    rates: dict[int, float] = {}
    fits, fails = 0, None
    while fails is None or fails - fits > max(1, fits // 8):
        batch = 2 * fits or size.batch if fails is None else (fits + fails) // 2
        seconds = trial(size, batch, settings)
        release()
        if seconds is None:
            fails = batch
        else:
            fits, rates[batch] = batch, batch * size.sequence / seconds
    return {"batch": fits, "tokens_per_second": rates.get(fits), "tokens_per_second_by_batch": rates}


def trial(size: Size, batch: int, settings: dict[str, Any]) -> float | None:
    """Train a few steps on a batch; return the median seconds of a step, None if memory ran out."""
    import torch

    try:
        with tempfile.TemporaryDirectory() as folder:
            return timed_steps(size, batch, folder, **settings)
    except torch.OutOfMemoryError:
        return None


def release() -> None:
    """Give back the memory of a trial: a trainer is full of cycles, and the next one needs its place."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def timed_steps(size: Size, batch: int, folder: str, *, lora: bool = False, **settings: Any) -> float:
    """Train a few steps, and return the median seconds of those after the first."""
    model = build_model("decoder", size, "cuda")
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(**LORA))
    trainer = build_trainer(
        model,
        build_examples("decoder", size, batch) * STEPS,
        folder,
        device="cuda",
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        **settings,
    )
    ends = stamp_steps_(trainer, "cuda")
    trainer.train()
    return median(stop["wall"] - start["wall"] for start, stop in zip(ends, ends[1:], strict=False))


def cells(row: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    """Return one line of the table, beside backpropagation where that fits at all."""
    rate = row["tokens_per_second"]
    if rate is None:
        return [row["method"], "none", "", "", ""]
    ratios = ["", ""]
    if plain["batch"]:
        ratios = [f"{row['batch'] / plain['batch']:.2f}", f"{rate / plain['tokens_per_second']:.2f}"]
    return [row["method"], str(row["batch"]), ratios[0], f"{rate:,.0f}", ratios[1]]


if __name__ == "__main__":
    main()
