"""Measure the memory of a training step: block-local learning, backpropagation, gradient checkpointing.

Runs real trainers on a 12-layer encoder with a class per text and on a 12-layer decoder that predicts tokens, with a
small vocabulary and with a large one, whose logits are saved by the last block whatever K. Block-local learning comes
with the default heads, which borrow layers, and with heads of their own. Measured in one micro-batch of the second
optimizer step:

- saved: the most bytes that autograd keeps for backward passes at any one time, parameters left out. This is what the
  target is about: at most 1/K + 0.10 of what backpropagation saves, heads and losses included. It cannot be seen
  where activations are checkpointed.
- alive: the most bytes of all tensors made in the step, with the gradients of the parameters in place beforehand.
- with gradients: the same, gradients included. Stepping each block at once keeps those of one block.
- allocated (GPU only): the peak of CUDA's allocator over what was allocated before, with gradients.

    OMP_NUM_THREADS=1 python scripts/benchmarks/memory.py --device cpu
    python scripts/benchmarks/memory.py --device cuda
    python scripts/benchmarks/memory.py --device cpu --width 128 --batch 4    # a laptop, in a minute
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
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


SIZES = {"cpu": Size(width=512, batch=4), "cuda": Size(width=1024, batch=16, sequence=512)}
LARGE_VOCABULARY = 32_000
TARGET_MARGIN = 0.10
# Tokens whose logits are made at a time.
CHUNK = 64
PLAIN, CHECKPOINTED = "backpropagation", "gradient checkpointing"
OWN_HEADS = "heads of their own"
# What frees most: activations within a block, and the gradients of all others.
LEAST = f"step_per_block, {CHECKPOINTED}"
MEASURES = ("saved", "alive", "with_gradients", "allocated")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every method on every model, print a table, write it as JSON."""
    arguments = parser("Memory of a training step.", **SIZES)
    arguments.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4, 12], help="Numbers of blocks K.")
    options = parse(arguments, argv)
    device = prepare(options)
    size = chosen_size(options, SIZES[device])
    models = {"encoder": ("encoder", size), f"decoder, V={size.vocabulary}": ("decoder", size)}
    if options.vocabulary is None:
        models[f"decoder, V={LARGE_VOCABULARY}"] = ("decoder", replace(size, vocabulary=LARGE_VOCABULARY))
    rows = []
    for name, (kind, model_size) in models.items():
        measured = {}
        for method, settings in methods(options.blocks, kind).items():
            measured[method] = measure(kind, model_size, device, **settings)
            rows.append(row(name, method, settings, measured[method], measured[PLAIN]))
    columns = [measure for measure in MEASURES if device == "cuda" or measure != "allocated"]
    show(rows, columns)
    print(f"\nWritten to {write_report('memory', device, options, {'sizes': models, 'rows': rows})}")


def methods(blocks: Sequence[int], kind: str) -> dict[str, dict[str, Any]]:
    """Return the settings of every method, by name; backpropagation first."""
    some = blocks[-2 if len(blocks) > 1 else -1]
    local = {
        **{f"K={count}": {"num_blocks": count} for count in blocks},
        f"K={some}, balance=cost": {"num_blocks": some, "balance": "cost"},
        f"K={some}, step_per_block": {"num_blocks": some, "step_per_block": True},
    }
    least = {f"K={some}, {LEAST}": {"num_blocks": some, "step_per_block": True}}
    if kind == "decoder":
        local[f"K={some}, chunked_loss={CHUNK}"] = {"num_blocks": some, "chunked_loss": CHUNK}
        least[f"K={some}, {LEAST}, chunked_loss={CHUNK}"] = {**least[f"K={some}, {LEAST}"], "chunked_loss": CHUNK}
    return {
        PLAIN: {"block_local": None},
        CHECKPOINTED: {"block_local": None, "checkpointing": True},
        **{name: {"block_local": fields} for name, fields in with_own_heads(local).items()},
        **{name: {"block_local": fields, "checkpointing": True} for name, fields in with_own_heads(least).items()},
    }


def with_own_heads(local: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return configs, and each of several blocks once more with heads of their own."""
    own = {f"{name}, {OWN_HEADS}": {**fields, "head_layers": 0} for name, fields in local.items()}
    return local | {name: fields for name, fields in own.items() if fields["num_blocks"] > 1}


def measure(
    kind: str, size: Size, device: str, *, block_local: dict[str, Any] | None, checkpointing: bool = False
) -> dict[str, Any]:
    """Train for two optimizer steps and return the peaks of the second, in bytes.

    The micro-batches of one step differ in whether gradients are there already; where each block is stepped at once
    there is only one, because gradients are freed in it.
    """
    micro_batches = 1 if block_local and block_local.get("step_per_block") else 2
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            build_model(kind, size, device),
            build_examples(kind, size, size.batch * micro_batches * 2),
            folder,
            device=device,
            block_local=block_local,
            checkpointing=checkpointing,
            max_steps=2,
            gradient_accumulation_steps=micro_batches,
            per_device_train_batch_size=size.batch,
        )
        peaks = meter_steps_(trainer, device)
        trainer.train()
    del trainer
    gc.collect()  # a trainer is full of cycles, and the next one needs its place
    fresh, last = peaks[-micro_batches], peaks[-1]
    return {
        "saved": None if checkpointing else fresh["saved"],
        "alive": last["alive"] if micro_batches == 2 else None,
        "with_gradients": fresh["alive"],
        "allocated": fresh["allocated"],
        "micro_batches": peaks,
    }


def meter_steps_(trainer: Any, device: str) -> list[dict[str, int | None]]:
    """Let a trainer measure its own forward and backward passes. Returns the list that it will fill."""
    from hf_blocklocal.records.memory import ActivationMeter, TensorMeter

    peaks: list[dict[str, int | None]] = []
    step = trainer.training_step

    def metered(model: Any, *args: Any, **kwargs: Any) -> Any:
        with allocated_peak(device) as peak, ActivationMeter(model) as saved, TensorMeter() as alive:
            result = step(model, *args, **kwargs)
        peaks.append({"saved": saved.peak_bytes, "alive": alive.peak_bytes, "allocated": peak.get("bytes")})
        return result

    trainer.training_step = metered
    return peaks


@contextmanager
def allocated_peak(device: str) -> Iterator[dict[str, int]]:
    """Yield a mapping that holds, afterwards, the `bytes` that CUDA has allocated at most on top of what was."""
    import torch

    peak: dict[str, int] = {}
    if device == "cpu":
        yield peak
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield peak
    torch.cuda.synchronize()
    peak["bytes"] = torch.cuda.max_memory_allocated() - before


def row(
    model: str, method: str, settings: dict[str, Any], measured: dict[str, Any], plain: dict[str, Any]
) -> dict[str, Any]:
    """Put one measurement beside that of backpropagation."""
    shares = {name: measured[name] / plain[name] for name in MEASURES if measured[name] is not None}
    blocks = (settings["block_local"] or {}).get("num_blocks")
    allowed = 1 / blocks + TARGET_MARGIN if blocks and "saved" in shares else None
    met = shares["saved"] <= allowed if allowed else None
    return {
        "model": model,
        "method": method,
        "bytes": measured,
        "shares": shares,
        "allowed_share_saved": allowed,
        "target_met": met,
    }


def show(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Print the rows: mebibytes, and the share of what backpropagation needs."""
    header = ["model", "method"]
    for column in columns:
        header += [f"{column.replace('_', ' ')}, MiB", "share"] + (["allowed"] if column == "saved" else [])
    print_table(header, [cells(each, columns) for each in rows], left=2)


def cells(result: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """Return one line of the table."""
    line = [result["model"], result["method"]]
    for column in columns:
        size, share, allowed = result["bytes"][column], result["shares"].get(column), result["allowed_share_saved"]
        line += ["-", "-"] if size is None else [f"{size / 2**20:.1f}", f"{share:.3f}"]
        if column == "saved":
            line.append("-" if allowed is None else f"{allowed:.3f}" + (" " if result["target_met"] else "!"))
    return line


if __name__ == "__main__":
    main()
