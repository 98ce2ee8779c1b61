"""Compare the time of a training step: block-local learning, backpropagation, gradient checkpointing.

Builds one real trainer per method and lets them train a few steps each in rotation, so that whatever slows the machine
down slows all of them. A step is all that lies between the ends of two optimizer steps: fetching the batch, forward
and backward passes, feedback, clipping, the optimizer. Every round gives one ratio per method, its median step against
the median step of the plain `Trainer` in the same round; a first round is not counted. The target is a median ratio
of at most 1.10 at K = 3, which was set for heads of their own. Those that borrow layers, the default, run more, the
more blocks there are. On a CPU the same is told in processor time, which other processes disturb less.

    OMP_NUM_THREADS=1 python scripts/benchmarks/step_time.py --device cpu
    python scripts/benchmarks/step_time.py --device cuda
    python scripts/benchmarks/step_time.py --device cpu --width 128 --rounds 3    # a laptop, in a minute
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
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


SIZES = {"cpu": Size(), "cuda": Size(width=768, vocabulary=32_000, batch=64, sequence=512)}
# On a GPU rounds are short, and the first steps of each are slower.
STEPS, WARM_UP = {"cpu": 2, "cuda": 20}, {"cpu": 1, "cuda": 5}
TARGET = 1.10
PLAIN = "backpropagation"
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def main(argv: Sequence[str] | None = None) -> None:
    """Time every method on every model, print a table, write it as JSON."""
    arguments = parser("Time of a training step.", **SIZES)
    arguments.add_argument("--blocks", type=int, nargs="+", default=[3, 4], help="Numbers of blocks K.")
    arguments.add_argument("--rounds", type=int, default=7, help="Times that every method has its turn.")
    arguments.add_argument("--steps", type=int, help="Steps timed in a turn. Default: 2 on cpu, 20 on cuda.")
    options = parse(arguments, argv)
    device = prepare(options)
    size = chosen_size(options, SIZES[device])
    steps = options.steps or STEPS[device]
    results = []
    for kind in ("encoder", "decoder"):
        with tempfile.TemporaryDirectory() as folder:
            turns = {
                method: turn(kind, size, device, Path(folder), steps, **settings)
                for method, settings in methods(options.blocks).items()
            }
            rounds = [{method: train() for method, train in turns.items()} for _ in range(options.rounds + 1)][1:]
        results += [summary(kind, method, rounds) for method in turns]
    show(results, device)
    print(f"\nWritten to {write_report('step_time', device, options, {'size': size, 'results': results})}")


def methods(blocks: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return the settings of every method, by name; backpropagation first."""
    heads = {
        "": {},
        ", heads of their own": {"head_layers": 0},
        ", heads of their own, step_per_block": {"head_layers": 0, "step_per_block": True},
    }
    return {
        PLAIN: {"block_local": None},
        "gradient checkpointing": {"block_local": None, "checkpointing": True},
        **{
            f"K={count}{name}": {"block_local": {"num_blocks": count, **fields}}
            for count in blocks
            for name, fields in heads.items()
        },
    }


def turn(
    kind: str, size: Size, device: str, folder: Path, steps: int, **settings: Any
) -> Callable[[], dict[str, list[float]]]:
    """Return a function that trains for a turn and returns the seconds of its steps by clock, without the warm-up."""
    all_steps = WARM_UP[device] + steps
    trainer = build_trainer(
        build_model(kind, size, device),
        build_examples(kind, size, size.batch * all_steps),
        str(folder),
        device=device,
        max_steps=all_steps,
        per_device_train_batch_size=size.batch,
        **settings,
    )
    ends = stamp_steps_(trainer, device)

    def train() -> dict[str, list[float]]:
        ends.clear()
        trainer.train()
        timed = ends[-steps - 1 :]
        return {
            clock: [stop[clock] - start[clock] for start, stop in zip(timed, timed[1:], strict=False)]
            for clock in CLOCKS
        }

    return train


def stamp_steps_(trainer: Any, device: str) -> list[dict[str, float]]:
    """Let a trainer note the time at the end of each step, by clock. Returns the list that it will fill."""
    import torch
    from transformers import TrainerCallback

    ends: list[dict[str, float]] = []

    class Stamp(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            ends.append({clock: read() for clock, read in CLOCKS.items()})

    trainer.add_callback(Stamp())
    return ends


def summary(kind: str, method: str, rounds: Sequence[dict[str, dict[str, list[float]]]]) -> dict[str, Any]:
    """Put the rounds of one method beside those of backpropagation."""
    by_clock = {}
    for clock in CLOCKS:
        medians = [median(each[method][clock]) for each in rounds]
        ratios = [mine / median(each[PLAIN][clock]) for mine, each in zip(medians, rounds, strict=True)]
        by_clock[clock] = {
            "seconds_by_round": [each[method][clock] for each in rounds],
            "seconds": median(medians),
            "ratios": ratios,
            "ratio": median(ratios),
        }
    met = by_clock["wall"]["ratio"] <= TARGET if method.startswith("K=") else None
    return {"model": kind, "method": method, **by_clock, "target_met": met}


def show(results: Sequence[dict[str, Any]], device: str) -> None:
    """Print the results: milliseconds, and the median ratio to backpropagation with its range."""
    clocks = ["wall", "processor"] if device == "cpu" else ["wall"]
    header = ["model", "method", "step, ms"]
    header += [f"ratio, {clock} time" if device == "cpu" else "ratio" for clock in clocks] + ["target"]
    rows = []
    for each in results:
        ratios = [
            f"{timed['ratio']:.3f} [{min(timed['ratios']):.3f}-{max(timed['ratios']):.3f}]"
            for timed in (each[clock] for clock in clocks)
        ]
        met = {None: "", True: f"<= {TARGET:.2f}", False: f"misses {TARGET:.2f}"}[each["target_met"]]
        rows.append([each["model"], each["method"], f"{each['wall']['seconds'] * 1e3:.1f}", *ratios, met])
    print_table(header, rows, left=2)


if __name__ == "__main__":
    main()
