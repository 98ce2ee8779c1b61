"""Throughput of a block per process beside one process with all blocks, backpropagation, and data parallelism.

Heads are of their own, which is nearly no work. Beside that stand the default heads of several processes, which train
a copy of an upper layer, here in one process too: that makes the lower block the larger one, unless the model has a
layer more. And lens heads, which train a copy of the model's own task head alone.

Every way of training is started anew in each round, one after the other, with `accelerate launch` where it takes
several processes, one thread each, the same global batch and an optimizer step per batch. Told per way: samples per
second, the processor time of a step in the busiest process, and the share of time that each process waited for a
neighbour. On a machine whose cores others use as well, wall time says little; a ratio of processor times says what
processes with a core each would reach, if nothing waited.

On GPUs processes speak by NCCL. Where there is one, they share it and speak by gloo: that shows that it works, not how
fast. With NVIDIA's multi-process service each process has a part of the GPU, the same in every way of training, and
NCCL 2.30 or later may be used.

    OMP_NUM_THREADS=1 python scripts/benchmarks/block_parallel.py --device cpu
    OMP_NUM_THREADS=1 python scripts/benchmarks/block_parallel.py --rounds 1 --width 64 --steps 4   # does it run?
    CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=50 NCCL_MULTI_RANK_GPU_ENABLE=1 python scripts/benchmarks/block_parallel.py
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from common import (
    Size,
    build_examples,
    build_model,
    build_trainer,
    chosen_size,
    fitting_backend,
    parse,
    parser,
    prepare,
    print_table,
    run_processes,
    write_report,
)


SIZE = Size(layers=8, batch=16)
SIZES = {"cpu": SIZE, "cuda": Size(layers=8, width=1024, batch=32, sequence=512)}
WARM_UP = 4
ONE, BACKPROPAGATION = "block-local, one process", "backpropagation, one process"
TWO = "block-local, 2 processes"
DEFAULT, EVEN, LENS = "default heads", "default heads, a layer more", "lens heads"
ONE_DEFAULT, ONE_EVEN, ONE_LENS = (f"{ONE}, {heads}" for heads in (DEFAULT, EVEN, LENS))


@dataclass(frozen=True)
class Way:
    """A way of training.

    Attributes:
        processes: Processes it takes.
        block_local: Fields of `BlockLocalConfig`; none for the plain Trainer.
        divided: By how much a batch is divided among processes.
        more_layers: Layers that its model has more than that of other ways.
        beside: The way of one process that it is compared with.
    """

    processes: int = 1
    block_local: dict[str, Any] | None = None
    divided: int = 1
    more_layers: int = 0
    beside: str = ONE


def blocks(processes: int, **heads: int | str) -> dict[str, Any]:
    """Return the fields of a config with a block per process, or with two of them in one."""
    return {"num_blocks": max(processes, 2), "block_parallel_size": processes, **heads}


WAYS = {
    BACKPROPAGATION: Way(),
    ONE: Way(1, blocks(1, head_layers=0)),
    TWO: Way(2, blocks(2, head_layers=0)),
    "block-local, 4 processes": Way(4, blocks(4, head_layers=0)),
    ONE_DEFAULT: Way(1, blocks(1, head_copies="trained"), beside=ONE_DEFAULT),
    f"{TWO}, {DEFAULT}": Way(2, blocks(2), beside=ONE_DEFAULT),
    ONE_EVEN: Way(1, blocks(1, head_copies="trained", balance="cost"), more_layers=1, beside=ONE_EVEN),
    f"{TWO}, {EVEN}": Way(2, blocks(2, balance="cost"), more_layers=1, beside=ONE_EVEN),
    ONE_LENS: Way(1, blocks(1, head_layers=0, head_lens=True, head_copies="trained"), beside=ONE_LENS),
    f"{TWO}, {LENS}": Way(2, blocks(2, head_layers=0, head_lens=True), beside=ONE_LENS),
    "backpropagation, 2 processes, data parallel": Way(2, divided=2),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Time every way of training in rotation, print a table, write it as JSON."""
    arguments = parser("Throughput of a block per process.", **SIZES)
    arguments.add_argument("--rounds", type=int, default=5, help="Times that every way has its turn.")
    arguments.add_argument("--steps", type=int, default=30, help="Steps timed in a turn.")
    arguments.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="Default: all.")
    arguments.add_argument("--work", help=argparse.SUPPRESS)
    options = parse(arguments, argv)
    device = prepare(options)
    size = chosen_size(options, SIZES[device])
    if options.work:
        train(options.work, size, device, options)
        return
    ways = [name for name in WAYS if name in options.ways]
    if missing := ({WAYS[name].beside for name in ways} | {BACKPROPAGATION}) - set(ways):
        raise SystemExit(f"--ways must hold what others are compared with: {', '.join(sorted(missing))}.")
    rounds = []
    for number in range(options.rounds):
        rounds.append({way: start(way, device, options) for way in ways})
        print(f"round {number + 1} of {options.rounds}", flush=True)
    results = [summary(way, rounds, size) for way in ways]
    show(results)
    report = {"size": size, "rounds": options.rounds, "steps": options.steps, "results": results}
    report |= how_they_meet(device, max(WAYS[way].processes for way in ways))
    print(f"\nWritten to {write_report('block_parallel', device, options, report)}")


def how_they_meet(device: str, processes: int) -> dict[str, Any]:
    """Return by what processes speak to each other, and the part of a GPU that each may use."""
    if device == "cpu":
        return {"backend": "gloo"}
    percentage = int(os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "100"))
    return {"backend": fitting_backend(device, processes) or "nccl", "gpu_percentage": percentage}


def start(way: str, device: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """Train in a way once; return what each process has told."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"OMP_NUM_THREADS": str(options.threads), "BENCHMARK_FOLDER": folder}
        run_processes(__file__, [*options.words, "--work", way], WAYS[way].processes, environment, device=device)
        return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("told-*.json"))]


def train(way: str, size: Size, device: str, options: argparse.Namespace) -> None:
    """Train in one process of a way and leave what was measured."""
    import torch
    from transformers import TrainerCallback

    steps = WARM_UP + options.steps
    size = replace(size, layers=size.layers + WAYS[way].more_layers)
    trainer = build_trainer(
        build_model("encoder", size),
        build_examples("encoder", size, size.batch * steps),
        os.environ["BENCHMARK_FOLDER"],
        device=device,
        block_local=WAYS[way].block_local,
        max_steps=steps,
        ddp_backend=fitting_backend(device, WAYS[way].processes),
        per_device_train_batch_size=size.batch // WAYS[way].divided,
        # Every look at whether a loss is a number waits for nobody on a CPU; on a GPU it would.
        logging_nan_inf_filter=False,
    )
    chain = getattr(trainer, "_chain", None)
    marks: list[tuple[float, float, float]] = []

    class Stamp(TrainerCallback):
        def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step in (WARM_UP, steps):
                if device == "cuda":
                    torch.cuda.synchronize()
                waited = 0.0 if chain is None else chain.idle_seconds
                marks.append((time.perf_counter(), time.process_time(), waited))

    trainer.add_callback(Stamp())
    trainer.train()
    (wall, busy, waited) = (stop - start for start, stop in zip(*marks, strict=True))
    told = {"wall": wall / options.steps, "processor": busy / options.steps, "waited": waited / wall}
    folder = Path(os.environ["BENCHMARK_FOLDER"])
    (folder / f"told-{trainer.args.process_index}.json").write_text(json.dumps(told))


def summary(way: str, rounds: Sequence[dict[str, list[dict[str, float]]]], size: Size) -> dict[str, Any]:
    """Put the rounds of one way beside those of one process."""

    def busiest(name: str, each: dict[str, list[dict[str, float]]], clock: str) -> float:
        return max(process[clock] for process in each[name])

    result: dict[str, Any] = {"way": way, "processes": WAYS[way].processes, "beside": WAYS[way].beside}
    result["rounds"] = [each[way] for each in rounds]
    result["samples_per_second"] = median(size.batch / busiest(way, each, "wall") for each in rounds)
    result["processor_ms"] = median(1e3 * busiest(way, each, "processor") for each in rounds)
    for other in (WAYS[way].beside, BACKPROPAGATION):
        result[f"times {other}"] = {
            clock: sorted(busiest(other, each, clock) / busiest(way, each, clock) for each in rounds)
            for clock in ("wall", "processor")
        }
    by_process = zip(*(each[way] for each in rounds), strict=True)
    result["waited"] = [median(process["waited"] for process in told) for told in by_process]
    return result


def show(results: Sequence[dict[str, Any]]) -> None:
    """Print the results."""
    header = ["", "samples/s", "busiest, ms", "x one process, wall", "x one process, processor", "waited, by block"]
    rows = []
    for each in results:
        ratios = [spread(each[f"times {each['beside']}"][clock]) for clock in ("wall", "processor")]
        waited = " ".join(f"{share:.0%}" for share in each["waited"]) if "block-local" in each["way"] else ""
        rows.append([each["way"], f"{each['samples_per_second']:.1f}", f"{each['processor_ms']:.0f}", *ratios, waited])
    print_table(header, rows, left=1)


def spread(ratios: Sequence[float]) -> str:
    """Return the median of sorted ratios with their range."""
    return f"{median(ratios):.2f} [{ratios[0]:.2f}-{ratios[-1]:.2f}]"


if __name__ == "__main__":
    main()
