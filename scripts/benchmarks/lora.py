"""Compare adapters with all weights, block by block and as a whole: accuracy, memory and time at one budget.

MiniLM learns which chapter of the Library Reference a docstring is from, as in `learning.py`. Each of four (LoRA
or all weights, `BlockLocalTrainer` or `Trainer`) chooses its learning rate on validation texts with the first seed,
and is scored on the test texts with all seeds. Memory is that of the first step: what autograd saves for backward, and
all tensors made in it with the gradients. Time is that of the steps after the first.

    OMP_NUM_THREADS=1 python scripts/benchmarks/lora.py
    OMP_NUM_THREADS=1 python scripts/benchmarks/lora.py --seeds 1 --texts 64 --tests 64    # a laptop, in a minute
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from common import parse, parser, prepare, print_table, write_report


RATES = {"LoRA": (1e-3, 3e-3, 1e-2), "all weights": (1.2e-4, 3e-4, 7e-4)}
WHAT, HOW = ("LoRA", "all weights"), ("block-local", "backpropagation")
HEADER = ("trained", "by", "test accuracy", "trainable", "saved, MiB", "alive, MiB", "train time, s")


def main(argv: Sequence[str] | None = None) -> None:
    """Train everything, print a table, write it as JSON."""
    arguments = parser("Adapters beside all weights.")
    arguments.add_argument("--blocks", type=int, default=3, help="Number of blocks K.")
    arguments.add_argument("--seeds", type=int, default=3, help="Runs with the chosen rate, each with a seed.")
    arguments.add_argument("--texts", type=int, default=768, help="Texts to learn from.")
    arguments.add_argument("--tests", type=int, default=1500, help="Texts to be scored on.")
    options = parse(arguments, argv)
    prepare(options)
    from learning_tasks.text_classification import TextClassification

    task = replace(TextClassification(), train_texts=options.texts, test_texts=options.tests)
    with tempfile.TemporaryDirectory() as folder:
        prepared = task.prepare(Path(folder))
        rows = [measure(task, prepared, what, how, options) for what in WHAT for how in HOW]
    print_table(HEADER, [cells(row) for row in rows], left=2)
    settings = {"blocks": options.blocks, "seeds": options.seeds, "budget": task.budget, "texts": options.texts}
    print(f"\nWritten to {write_report('lora', 'cpu', options, {'settings': settings, 'rows': rows})}")


def measure(task: Any, prepared: Path, what: str, how: str, options: Any) -> dict[str, Any]:
    """Choose a rate and return what comes of it."""
    blocks = options.blocks if how == "block-local" else None
    tried = {rate: run(task, prepared, what, blocks, rate, seed=0) for rate in RATES[what]}
    rate = max(tried, key=lambda each: tried[each]["validation"])
    runs = [tried[rate], *(run(task, prepared, what, blocks, rate, seed=seed) for seed in range(1, options.seeds))]
    return {
        "what": what,
        "how": how,
        "rate": rate,
        "at_edge": rate in (RATES[what][0], RATES[what][-1]),
        "validation_by_rate": {str(each): result["validation"] for each, result in tried.items()},
        "test": [result["test"] for result in runs],
        "seconds": [result["seconds"] for result in runs],
        **{key: runs[0][key] for key in ("trainable", "saved", "alive")},
    }


def run(task: Any, prepared: Path, what: str, blocks: int | None, rate: float, *, seed: int) -> dict[str, Any]:
    """Train once. The first step is the one whose memory is measured."""
    import torch
    from learning_runs import silent_arguments, with_adapters
    from learning_tasks.base import load_data
    from transformers import PrinterCallback, Trainer

    from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer
    from hf_blocklocal.records.memory import ActivationMeter, TensorMeter

    data = load_data(prepared)
    model = task.model(prepared, seed)
    if what == "LoRA":
        torch.manual_seed(seed)
        model = with_adapters(model, task)
    peaks: list[tuple[int, int, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "args": silent_arguments(folder, **task.budget, learning_rate=rate, seed=seed),
            "train_dataset": data.train,
            "data_collator": task.collate,
        }
        if blocks is None:
            trainer = Trainer(model, **common)
        else:
            trainer = BlockLocalTrainer(model, block_local=BlockLocalConfig(num_blocks=blocks), **common)
        trainer.remove_callback(PrinterCallback)
        step = trainer.training_step

        def metered(module: Any, *args: Any, **kwargs: Any) -> Any:
            if peaks:
                return step(module, *args, **kwargs)
            with ActivationMeter(module) as saved, TensorMeter() as alive:
                result = step(module, *args, **kwargs)
            peaks.append((saved.peak_bytes, alive.peak_bytes, time.perf_counter()))
            return result

        trainer.training_step = metered
        trainer.train()
        seconds = time.perf_counter() - peaks[0][2]
    result = {
        "validation": task.score(model, data.validation),
        "test": task.score(model, data.test),
        "seconds": round(seconds, 2),
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "saved": peaks[0][0],
        "alive": peaks[0][1],
    }
    del trainer, model
    gc.collect()  # a trainer is full of cycles, and the next one needs its place
    return result


def cells(row: dict[str, Any]) -> list[str]:
    """Return one line of the table."""
    spread = f" ± {stdev(row['test']):.3f}" if len(row["test"]) > 1 else ""
    return [
        row["what"],
        row["how"],
        f"{mean(row['test']):.3f}{spread}{'°' if row['at_edge'] else ''}",
        f"{row['trainable'] / 1e3:,.0f}k",
        f"{row['saved'] / 2**20:.1f}",
        f"{row['alive'] / 2**20:.1f}",
        f"{mean(row['seconds']):.0f}",
    ]


if __name__ == "__main__":
    main()
