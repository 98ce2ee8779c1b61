"""Block-local streaming beside the schedules of torch.distributed.pipelining, on emulated devices.

To run it (some minutes): python scripts/benchmarks/pipelining.py

Every rank is a process of its own, and messages are real, over gloo; what a device would compute is slept. So
processes do not compete for cores, and what is measured is waiting: bubbles, and the work of the runtime itself. A
micro-batch takes a rank the same time everywhere, an optimizer step follows every batch, and utilisation is that time
over the time that has passed. Block-local heads take a share of their block on top (--head), which counts as lost.
The stream runs a second time over a link of so many bits a second (--gigabits): each message takes as long as it would
there, slept by the thread that sends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import parse, parser, print_table, write_report
from torch import Tensor, nn
from torch.distributed import pipelining


WIDTH = 64
ROUNDS, STEPS = 5, 1
# Steps of a stream until it is filled, and steps that are then timed.
FILLING, STREAMED = 4, 8
MICRO_BATCHES = (1, 2, 4, 8)
STREAM = "block-local"
SLOW_STREAM = "block-local, slow link"
# Name of the schedule: class, stages per rank, whether they go up and down again, and the micro-batches for each rank
# that torch wants at least.
SCHEDULES = {
    "GPipe": ("ScheduleGPipe", 1, False, 0),
    "1F1B": ("Schedule1F1B", 1, False, 1),
    "interleaved": ("ScheduleInterleaved1F1B", 2, False, 0),
    "interleaved ZB": ("ScheduleInterleavedZeroBubble", 2, False, 0),
    "ZBV": ("ScheduleZBVZeroBubble", 2, True, 0),
    "DualPipeV": ("ScheduleDualPipeV", 2, True, 2),
}


class _Asleep(torch.autograd.Function):
    """Hands a tensor on, and sleeps in the forward pass, in the backward pass or in both."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, before: float, after: float) -> Tensor:
        time.sleep(before)
        ctx.after = after
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.after)
        return gradient, None, None


class Device(nn.Module):
    """What a stage would compute, slept: forward pass, gradient of the input and gradient of the weights apart."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        """Sleep as long as a pass takes."""
        # Layers inside the first stage want the gradient of their input too, although the stage as a whole does not.
        to_weights = self.seconds if hidden.requires_grad else 2 * self.seconds
        hidden = _Asleep.apply(hidden, self.seconds, self.seconds)
        return hidden + _Asleep.apply(self.weight, 0.0, to_weights)


@dataclass(frozen=True)
class Emulated:
    """What is made believe.

    Attributes:
        seconds: A pass of a rank's layers on a micro-batch.
        head: Cost of a head as a share of its block.
        other_heads: Other such costs, for a stream each.
        megabytes: Size of a message.
        gigabits: What the slow link carries a second.
    """

    seconds: float
    head: float
    other_heads: tuple[float, ...]
    megabytes: float
    gigabits: float

    @property
    def samples(self) -> int:
        """Rows of a micro-batch, for messages of that size."""
        return max(1, int(self.megabytes * 2**20 / 4 / WIDTH))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write it as JSON."""
    arguments = parser("Block-local streaming beside pipeline schedules, on emulated devices.", cpu_only=True)
    arguments.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="Numbers of ranks K.")
    arguments.add_argument("--seconds", type=float, default=0.04, help="A pass of a rank's layers on a micro-batch.")
    arguments.add_argument("--head", type=float, default=0.1, help="Cost of a head as a share of its block.")
    arguments.add_argument("--other-heads", type=float, nargs="*", default=[0.01, 0.5], help="Other such costs.")
    arguments.add_argument("--megabytes", type=float, default=1.0, help="Size of a message.")
    arguments.add_argument("--gigabits", type=float, default=1.0, help="A second, over the slow link.")
    options = parse(arguments, argv)
    emulated = Emulated(options.seconds, options.head, tuple(options.other_heads), options.megabytes, options.gigabits)
    rows = [row for blocks in options.ranks for row in measure(blocks, emulated, options.threads)]
    show(rows)
    settings = {**asdict(emulated), "rounds": ROUNDS}
    print(f"\nWritten to {write_report('pipelining', 'cpu', options, {'settings': settings, 'rows': rows})}")


def measure(blocks: int, emulated: Emulated, threads: int) -> list[dict[str, Any]]:
    """Run everything on some ranks. Returns a row for each schedule and number of micro-batches."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(_rank, (blocks, _free_port(), emulated, threads, results), nprocs=blocks)
    return results.get()


def _free_port() -> int:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store.port


def _rank(rank: int, blocks: int, port: int, emulated: Emulated, threads: int, results: Any) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=blocks)
    streams = [(STREAM, emulated.head, None), (SLOW_STREAM, emulated.head, emulated.gigabits)]
    streams += [(f"{STREAM}, heads of {head:.0%}", head, None) for head in emulated.other_heads]
    rows = [
        _row(name, blocks, 1, emulated.seconds, list(_streamed(rank, blocks, emulated, head, gigabits)))
        for name, head, gigabits in streams
    ]
    for name in SCHEDULES:
        for micro_batches in MICRO_BATCHES:
            run = _pipeline(name, rank, blocks, micro_batches, emulated)
            times = None if run is None else list(_timed(run))
            rows.append(_row(name, blocks, micro_batches, emulated.seconds, times))
    if rank == 0:
        results.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def _row(name: str, blocks: int, micro_batches: int, seconds: float, times: list[float] | None) -> dict[str, Any]:
    ideal = 3 * seconds * micro_batches
    shares = None if times is None else [ideal / each for each in times]
    return {
        "schedule": name,
        "K": blocks,
        "m": micro_batches,
        "seconds": times,
        "utilisation": None if shares is None else median(shares),
        "range": None if shares is None else [min(shares), max(shares)],
    }


def _slowest(seconds: float) -> float:
    longest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return longest.item()


def _timed(run: Callable[[], None]) -> Iterator[float]:
    """Run steps, a first one to warm up, and yield the seconds of one in each round."""
    run()
    for _ in range(ROUNDS):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(STEPS):
            run()
        yield _slowest(time.perf_counter() - start) / STEPS


def _pipeline(name: str, rank: int, blocks: int, micro_batches: int, emulated: Emulated) -> Callable[[], None] | None:
    """Return one training step of a schedule; nothing where it cannot be run with so few micro-batches."""
    kind, pieces, folded, least = SCHEDULES[name]
    if micro_batches < least * blocks:
        return None
    total = blocks * pieces
    numbers = [rank, total - 1 - rank] if folded else [rank + blocks * piece for piece in range(pieces)]
    stages = [
        pipelining.PipelineStage(Device(emulated.seconds / pieces), number, total, torch.device("cpu"))
        for number in numbers
    ]
    parameters = [parameter for stage in stages for parameter in stage.submod.parameters()]
    optimizer = torch.optim.AdamW(parameters)
    schedule = getattr(pipelining.schedules, kind)(
        stages if pieces > 1 else stages[0], micro_batches, loss_fn=lambda output, target: (output - target).mean()
    )
    batch = torch.zeros(emulated.samples * micro_batches, WIDTH)
    given = (batch,) if 0 in numbers else ()
    target = {"target": batch, "losses": []} if total - 1 in numbers else {}

    def run() -> None:
        schedule.step(*given, **target)
        optimizer.step()
        optimizer.zero_grad()

    return run


def _streamed(rank: int, blocks: int, emulated: Emulated, head: float, gigabits: float | None) -> Iterator[float]:
    """Stream batches through the blocks and yield the seconds of a step, once the stream is filled, in each round."""
    from hf_blocklocal.parallel.stream import Inbox, Link, Outbox

    class Throttled(Outbox):
        """Takes for every tensor the time that a slow link would take, on top of what loopback takes."""

        def _transmit(self, tensor: Tensor) -> None:
            time.sleep(0.0 if gigabits is None else 8 * tensor.nbytes / (gigabits * 1e9))
            super()._transmit(tensor)

    def link(lower: int, upper: int, peer: int) -> Link | None:
        group = dist.new_group([lower, upper], backend="gloo")
        return Link(peer, group, group, torch.device("cpu")) if rank in (lower, upper) else None

    edges = [link(lower, lower + 1, lower + 1 if rank == lower else lower) for lower in range(blocks - 1)]
    outbox = Throttled(edges[rank], _raise) if rank < blocks - 1 else None
    inbox = Inbox(edges[rank - 1], _raise) if rank > 0 else None
    boxes = [box for box in (outbox, inbox) if box is not None]
    for box in boxes:
        box.open()
    block = Device(emulated.seconds)
    optimizer = torch.optim.AdamW(block.parameters())
    for _ in range(ROUNDS):
        dist.barrier()
        for step in range(FILLING + STREAMED):
            if step == FILLING:
                start = time.perf_counter()
            arrived = torch.zeros(emulated.samples, WIDTH) if inbox is None else inbox.take().value
            output = block(arrived.requires_grad_())
            if outbox is not None:
                outbox.send({"step": step}, output.detach())
                time.sleep(3 * emulated.seconds * head)
            output.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        yield _slowest(time.perf_counter() - start) / STREAMED
    for box in boxes:
        box.close()


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise error


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows."""
    cells = [
        [
            row["schedule"],
            str(row["K"]),
            str(row["m"]),
            "-" if row["utilisation"] is None else f"{row['utilisation']:.3f}",
            "" if row["range"] is None else f"{row['range'][0]:.3f}-{row['range'][1]:.3f}",
        ]
        for row in rows
    ]
    print_table(["schedule", "K", "m", "utilisation", "range"], cells, left=1)


if __name__ == "__main__":
    main()
