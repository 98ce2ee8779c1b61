"""The main memory that processes of one machine need to load a model and to let go of all but a block each.

A random Llama is saved as an ordinary checkpoint and loaded by every process with `from_pretrained`, as a user's
script does; then a trainer is made of it, and one step taken. Told after each, by Linux: `own`, bytes that belong to
one process alone (anonymous memory, on top of what its libraries need), and `shared`, bytes of the file that all
processes of the machine have mapped and share, a page of which the system may drop at any time.

    OMP_NUM_THREADS=1 python scripts/benchmarks/loading.py
    OMP_NUM_THREADS=1 python scripts/benchmarks/loading.py --width 256 --processes 2    # does it run?
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
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
    run_processes,
    write_report,
)


SIZE = Size(layers=8, width=1024, batch=2, sequence=32)
MOMENTS = ("loaded", "set up", "one step")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one process and several, print a table, write it as JSON."""
    arguments = parser("Main memory to load a model in several processes.", cpu_only=True, cpu=SIZE)
    arguments.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="Blocks, a process each.")
    arguments.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parse(arguments, argv)
    size = chosen_size(options, SIZE)
    if options.work:
        work(options.work, size, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(options)
        model = build_model("decoder", size)
        model.save_pretrained(f"{folder}/model")
        weights = sum(parameter.nbytes for parameter in model.parameters())
        del model
        results = [start(processes, Path(folder), options) for processes in options.processes]
    report = {"size": size, "model_bytes": weights, "results": results}
    show(results, weights)
    print(f"\nWritten to {write_report('loading', 'cpu', options, report)}")


def start(processes: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run processes and return what each has told, by block."""
    told = folder / str(processes)
    told.mkdir()
    words = [*options.words, "--work", str(told)]
    run_processes(__file__, words, processes, {"OMP_NUM_THREADS": str(options.threads)})
    by_block = [json.loads((told / f"{block}.json").read_text()) for block in range(processes)]
    return {"processes": processes, "by_block": by_block}


def work(told: Path, size: Size, options: argparse.Namespace) -> None:
    """Load, set up and take a step in one process, and leave what memory that took."""
    prepare(options)
    from transformers import AutoModelForCausalLM

    from hf_blocklocal import BlockLocalTrainer  # noqa: F401 - what libraries need comes first

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    build_model("decoder", Size(layers=1, width=64, vocabulary=64))
    before, seen = resident(), {}
    model = AutoModelForCausalLM.from_pretrained(told.parent / "model")
    seen["loaded"] = resident()
    block_local = {"num_blocks": max(processes, 2), "block_parallel_size": processes, "head_layers": 0}
    trainer = build_trainer(
        model,
        build_examples("decoder", size, size.batch),
        str(told),
        device="cpu",
        block_local=block_local,
        max_steps=1,
        optim="sgd",  # whose state is nothing, so that what is left is weights and gradients
        per_device_train_batch_size=size.batch,
    )
    seen["set up"] = resident()
    trainer.train()
    seen["one step"] = resident()
    grown = {moment: {kind: now[kind] - before[kind] for kind in now} for moment, now in seen.items()}
    (told / f"{trainer.args.process_index}.json").write_text(json.dumps(grown))


def resident() -> dict[str, int]:
    """Return the bytes of this process alone, and of files that it has mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    parts = [line.partition(":") for line in lines]
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in parts if name.startswith("Rss")}
    return {"own": 1024 * kilobytes["RssAnon"], "shared": 1024 * (kilobytes["RssFile"] + kilobytes["RssShmem"])}


def show(results: Sequence[dict[str, Any]], weights: int) -> None:
    """Print each process's memory as a share of the model's weights."""
    print(f"Weights: {weights / 2**20:.0f} MiB. As a share of them:\n")
    header = ["processes", "block", *(f"{moment}, {kind}" for moment in MOMENTS for kind in ("own", "shared"))]
    rows = [
        [str(each["processes"]), str(block)]
        + [f"{told[moment][kind] / weights:.2f}" for moment in MOMENTS for kind in ("own", "shared")]
        for each in results
        for block, told in enumerate(each["by_block"])
    ]
    print_table(header, rows, left=2)


if __name__ == "__main__":
    main()
