"""How training scales to many ranks, in a simulator: block-local streaming beside pipelines of backpropagation.

To run it (a minute):              python scripts/benchmarks/scale.py
Against steps that were measured:  python scripts/benchmarks/scale.py --measured FILE [FILE ...]

Measured are the reports of `pipelining.py` and `block_parallel.py`, or lists of points. A point is a mapping:
`schedule` (block-local, GPipe, 1F1B, interleaved or ZB-H1), `blocks`, `step_seconds`, and in seconds what the
simulator is to start from: `forward`, `to_input`, `to_weights`, and, if need be, `micro_batches`, `optimizer`, `head`
(share of the three passes), `pace` (slowness of each rank), `jitter`, and `transfer` and `latency` of a message.

Efficiency is the time of the model's own passes over that of the ranks: what heads cost counts against it, as waiting
does. It is of steps, not of learning: how much a local step teaches is another table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from common import HERE, parse, parser, print_table, write_report
from schedules import BLOCK_LOCAL, ONE_F_ONE_B, SCHEDULES, ZERO_BUBBLE, Schedule, Work, block_local
from simulator import Network


RANKS = (2, 4, 8, 16, 32, 64)
MICRO_BATCHES = (1, 4, 8, 32, 128)
HEAD, OPTIMIZER = 0.1, 0.3
# A model of 64 layers of width 4096 with sequences of 2048 tokens in bfloat16: seconds of a layer's forward pass, and
# bytes of a boundary tensor. Links: bytes per second, and seconds of latency.
LAYERS, LAYER_SECONDS, MESSAGE_BYTES = 64, 2.2e-3, 2048 * 4096 * 2
LINKS = {
    "NVLink, 300 GB/s": (300e9, 5e-6),
    "InfiniBand, 50 GB/s": (50e9, 10e-6),
    "10 Gb/s Ethernet": (1.25e9, 50e-6),
    "1 Gb/s Ethernet": (0.125e9, 100e-6),
}
TOLERANCE = 0.10


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate, print tables, write them as JSON and as a plot."""
    arguments = parser("How training scales to many ranks, in a simulator.", cpu_only=True)
    arguments.add_argument(
        "--measured", type=Path, nargs="+", default=[], help="JSON of what the simulator is to meet."
    )
    arguments.add_argument("--plot", type=Path, default=HERE / "results" / "scale.png", help="Where to draw.")
    options = parse(arguments, argv)
    results: dict[str, Any] = {"settings": {"head": HEAD, "optimizer": OPTIMIZER, "layers": LAYERS}}
    results["ranks"] = list(by_ranks())
    results["links"] = list(by_link())
    results["jitter"] = list(by_jitter())
    results["barriers"] = list(by_barrier())
    results["imbalance"] = list(by_imbalance())
    for name in ("ranks", "links", "jitter", "barriers", "imbalance"):
        print(f"\n{name}: efficiency")
        show(results[name])
    if options.measured:
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in options.measured]
        results["measured"] = compare([point for report in reports for point in points_of(report)])
        print("\nmeasured points")
        show(results["measured"])
    from scale_plot import draw

    print(f"\nDrawn to {draw(results['ranks'], options.plot)}")
    print(f"Written to {write_report('scale', 'cpu', options, results)}")


def steps_of(schedule: Schedule, work: Work) -> int:
    """Return enough steps to see the steady state: a pipeline is in it at once, a stream once it is filled."""
    return 6 + (4 * work.blocks + 40) // work.micro_batches if schedule.name == BLOCK_LOCAL.name else 4


def efficiencies(work: Work) -> dict[str, float | None]:
    """Return what each schedule makes of some work; None where it cannot be done."""
    return {
        schedule.name: schedule.efficiency(work, steps=steps_of(schedule, work)) if schedule.fits(work) else None
        for schedule in SCHEDULES
    }


def by_ranks() -> Iterator[dict[str, Any]]:
    """Ranks alike and messages for nothing: what is lost is bubble, head and optimizer."""
    for blocks in RANKS:
        for micro_batches in MICRO_BATCHES:
            work = Work(blocks, micro_batches, optimizer=OPTIMIZER, head=HEAD)
            yield {"K": blocks, "m": micro_batches, **efficiencies(work)}


def by_link() -> Iterator[dict[str, Any]]:
    """One sequence per micro-batch of a large model, over links of different speed."""
    for name, (bandwidth, latency) in LINKS.items():
        for blocks, micro_batches in ((8, 8), (8, 32), (16, 16), (16, 64), (64, 64)):
            seconds = LAYERS / blocks * LAYER_SECONDS
            network = Network(MESSAGE_BYTES / bandwidth, latency)
            passes = {"forward": seconds, "to_input": seconds, "to_weights": seconds}
            work = Work(blocks, micro_batches, **passes, optimizer=OPTIMIZER * seconds, head=HEAD, network=network)
            yield {"link": name, "K": blocks, "m": micro_batches, **efficiencies(work)}


def by_jitter() -> Iterator[dict[str, Any]]:
    """Ranks whose pace varies from operation to operation, and how many messages may wait between them."""
    for jitter in (0.0, 0.05, 0.1, 0.2, 0.4):
        work = Work(8, jitter=jitter)
        row = {"jitter": jitter, "1F1B, m=8": ONE_F_ONE_B.efficiency(replace(work, micro_batches=8), steps=40)}
        for depth in (1, 2, 4, 8):
            schedule = replace(BLOCK_LOCAL, ops=partial(block_local, depth=depth))
            row[f"block-local, depth {depth}"] = schedule.efficiency(work, steps=400)
        yield row


def by_barrier() -> Iterator[dict[str, Any]]:
    """What a collective of all ranks every so many steps costs a stream."""
    for blocks in (8, 64):
        row: dict[str, Any] = {"K": blocks}
        for every in (0, 100, 10, 1):
            schedule = replace(BLOCK_LOCAL, ops=partial(block_local, barrier_every=every))
            name = f"every {every} steps" if every > 1 else "every step" if every else "never"
            row[name] = schedule.efficiency(Work(blocks), steps=400)
        yield row


def by_imbalance() -> Iterator[dict[str, Any]]:
    """The last rank slower than the others, as a language-model head makes it."""
    for slowness in (1.0, 1.25, 1.5, 2.0):
        work = Work(8, micro_batches=32, pace=(*[1.0] * 7, slowness))
        whole = {"block-local": BLOCK_LOCAL.efficiency(replace(work, micro_batches=1), steps=80)}
        pipes = {
            f"{schedule.name}, m=32": schedule.efficiency(work, steps=4) for schedule in (ONE_F_ONE_B, ZERO_BUBBLE)
        }
        yield {"last rank": slowness, **pipes, **whole}


def points_of(report: Any) -> list[dict[str, Any]]:
    """Return the measured points of a report: of emulated devices, of real steps, or a list of points as it is."""
    if isinstance(report, list):
        return report
    if "rows" in report:
        return list(_of_emulated(report["settings"], report["rows"]))
    return list(_of_real(report["results"], report["machine"]["cores"]))


def _of_emulated(settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a point for every schedule that torch could run and the simulator takes for possible."""
    schedules = {schedule.name: schedule for schedule in SCHEDULES}
    for row in rows:
        known = schedules.get(row["schedule"])
        if known is not None and row["seconds"] is not None and known.fits(Work(row["K"], row["m"])):
            point = {"schedule": row["schedule"], "blocks": row["K"], "micro_batches": row["m"]}
            yield point | {
                **dict.fromkeys(("forward", "to_input", "to_weights"), settings["seconds"]),
                "head": settings["head"] if row["schedule"] == BLOCK_LOCAL.name else 0.0,
                "step_seconds": median(row["seconds"]),
            }


def _of_real(results: Sequence[dict[str, Any]], cores: int) -> Iterator[dict[str, Any]]:
    """Yield a point for every block-parallel run that had a core for each process.

    What its processes computed, head and optimizer included, is their processor time; the simulator is to say how long
    they take together.
    """
    for row in results:
        if row["waited"] and 1 < row["processes"] <= cores and row["way"].startswith(BLOCK_LOCAL.name):
            by_rank = [median(each["processor"] for each in told) for told in zip(*row["rounds"], strict=True)]
            point = {"schedule": BLOCK_LOCAL.name, "blocks": row["processes"]}
            yield point | {
                **dict.fromkeys(("forward", "to_input", "to_weights"), by_rank[0] / 3),
                "pace": [each / by_rank[0] for each in by_rank],
                "step_seconds": median(max(each["wall"] for each in told) for told in row["rounds"]),
            }


def compare(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put what the simulator says beside steps that were measured.

    Args:
        points: As the head of this file says.
    """
    schedules = {schedule.name: schedule for schedule in SCHEDULES}
    known = {field.name for field in fields(Work)} - {"network"} | {"schedule", "step_seconds", "transfer", "latency"}
    rows = []
    for point in points:
        unknown = sorted(set(point) - known)
        if unknown or point.get("schedule") not in schedules:
            raise SystemExit(
                f"scale.py: a measured point has the unknown fields {unknown} and the schedule "
                f"{point.get('schedule')!r}. Fields are {sorted(known)}, schedules {sorted(schedules)}."
            )
        given = dict(point)
        schedule, measured = schedules[given.pop("schedule")], given.pop("step_seconds")
        network = Network(given.pop("transfer", 0.0), given.pop("latency", 0.0))
        work = Work(**given | {"network": network, "pace": tuple(given.get("pace", ()))})
        simulated = schedule.step_seconds(work, steps=max(steps_of(schedule, work), 40 if work.jitter else 0))
        deviation = simulated / measured - 1
        rows.append(
            {
                "schedule": schedule.name,
                "K": work.blocks,
                "m": work.micro_batches,
                "simulated s": simulated,
                "measured s": measured,
                "deviation": deviation,
                "within 10 %": abs(deviation) <= TOLERANCE,
                "work": asdict(work),
            }
        )
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table."""
    if not rows:
        print("none")
        return
    columns = [name for name in rows[0] if name != "work"]
    print_table(columns, [[cell(row[name]) for name in columns] for row in rows], left=1)


def cell(value: Any) -> str:
    """Write one value; a dash where a schedule cannot be run."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
