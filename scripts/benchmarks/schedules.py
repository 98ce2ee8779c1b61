"""In which order ranks work: block-local streaming, GPipe, 1F1B, interleaved 1F1B and zero-bubble H1.

Each makes, for a number of optimizer steps, what `simulator.play` plays out; each has a closed form of its step time
where ranks are alike, nothing varies and messages cost nothing, which the simulator is tested against.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from simulator import Need, Network, Op, play


@dataclass(frozen=True)
class Work:
    """What there is to be done, by rank and micro-batch.

    Attributes:
        blocks: Ranks, K.
        micro_batches: Micro-batches of an optimizer step, m.
        forward: Seconds of the forward pass of a rank's layers.
        to_input: Seconds of the backward pass to their input.
        to_weights: Seconds of the backward pass to their weights.
        optimizer: Seconds of an optimizer step.
        head: What the head of a block costs, as a share of the three; the last rank has none. Block-local only.
        pace: How much slower than that each rank is; empty where all are alike.
        jitter: Standard deviation of the logarithm of what each operation takes; its mean stays.
        network: The links.
    """

    blocks: int
    micro_batches: int = 1
    forward: float = 1.0
    to_input: float = 1.0
    to_weights: float = 1.0
    optimizer: float = 0.0
    head: float = 0.0
    pace: tuple[float, ...] = ()
    jitter: float = 0.0
    network: Network = field(default_factory=Network)

    @property
    def cycle(self) -> float:
        """Seconds of all three passes."""
        return self.forward + self.to_input + self.to_weights

    def slowness(self, rank: int) -> float:
        """Return how much slower a rank is."""
        return self.pace[rank] if self.pace else 1.0

    @property
    def ideal(self) -> float:
        """Seconds of a step if all ranks worked all the time on nothing but the model."""
        mean = sum(self.slowness(rank) for rank in range(self.blocks)) / self.blocks
        return self.micro_batches * self.cycle * mean


@dataclass(frozen=True)
class Schedule:
    """A way to train.

    Attributes:
        name: What it is called.
        ops: `(work, steps, seed) -> operations of each rank`.
        closed: `work -> seconds of a step`, for ranks alike without jitter, on a perfect network.
        fits: Whether it can be done with that work.
    """

    name: str
    ops: Callable[[Work, int, int], list[list[Op]]]
    closed: Callable[[Work], float]
    fits: Callable[[Work], bool] = lambda _work: True

    def step_seconds(self, work: Work, *, steps: int = 8, seed: int = 0) -> float:
        """Return the seconds of a step, once the first ones have filled what there is to be filled."""
        ends = play(self.ops(work, steps, seed), work.network).ends
        skipped = steps // 2
        return (_all_done(ends, work, steps - 1) - _all_done(ends, work, skipped - 1)) / (steps - skipped)

    def efficiency(self, work: Work, *, steps: int = 8, seed: int = 0) -> float:
        """Return the share of the ranks' time that goes into the model's own passes."""
        return work.ideal / self.step_seconds(work, steps=steps, seed=seed)


def _all_done(ends: dict, work: Work, step: int) -> float:
    return max(ends["O", rank, step] for rank in range(work.blocks))


class _Clock:
    """How long operations take, jitter included."""

    def __init__(self, work: Work, seed: int) -> None:
        self._work, self._random = work, random.Random(seed)

    def __call__(self, rank: int, seconds: float) -> float:
        sigma = self._work.jitter
        varied = self._random.lognormvariate(-sigma * sigma / 2, sigma) if sigma > 0 else 1.0
        return seconds * self._work.slowness(rank) * varied


# ---- Pipelines: the gradient comes back, and every step waits for it ----


Passes = Iterator[tuple[str, int, int]]


def _pipeline(order: Callable[[Work, int], Passes], chunks: int) -> Callable[..., list[list[Op]]]:
    """Turn the order of one step, `(kind, chunk, micro-batch)`, into operations."""

    def ops(work: Work, steps: int, seed: int) -> list[list[Op]]:
        clock, last = _Clock(work, seed), work.blocks * chunks - 1
        splits = any(kind == "W" for kind, _, _ in order(work, 0))
        backward = work.to_input + (0.0 if splits else work.to_weights)
        seconds = {"F": work.forward / chunks, "B": backward / chunks, "W": work.to_weights / chunks}
        ranks: list[list[Op]] = []
        for rank in range(work.blocks):
            mine = []
            for step in range(steps):
                for kind, chunk, batch in order(work, rank):
                    stage = chunk * work.blocks + rank
                    before = {"F": stage - 1, "B": stage + 1}.get(kind, -1)
                    needs = ()
                    if 0 <= before <= last and kind in "FB":
                        needs = (Need((kind, before, step, batch), sender=before % work.blocks),)
                    mine.append(Op((kind, stage, step, batch), clock(rank, seconds[kind]), needs))
                mine.append(Op(("O", rank, step), clock(rank, work.optimizer)))
            ranks.append(mine)
        return ranks

    return ops


def _gpipe(work: Work, _rank: int) -> Passes:
    yield from (("F", 0, batch) for batch in range(work.micro_batches))
    yield from (("B", 0, batch) for batch in range(work.micro_batches))


def _one_f_one_b(work: Work, rank: int) -> Passes:
    m = work.micro_batches
    ahead = min(work.blocks - 1 - rank, m)
    yield from (("F", 0, batch) for batch in range(ahead))
    for batch in range(m):
        if batch + ahead < m:
            yield "F", 0, batch + ahead
        yield "B", 0, batch


def _zero_bubble(work: Work, rank: int) -> Passes:
    """1F1B with the weights' gradients put off, on each rank by its number, to where it would wait."""
    m, done = work.micro_batches, 0
    for kind, chunk, batch in _one_f_one_b(work, rank):
        yield kind, chunk, batch
        if kind == "B" and batch >= rank:
            yield "W", 0, done
            done += 1
    yield from (("W", 0, batch) for batch in range(done, m))


CHUNKS = 2


def _interleaved(work: Work, rank: int) -> Passes:
    """1F1B with two pieces of the model on each rank, in groups of as many micro-batches as there are ranks."""
    K, m = work.blocks, work.micro_batches
    total = m * CHUNKS
    ahead = min(2 * (K - rank - 1) + (CHUNKS - 1) * K, total)

    def forward(number: int) -> tuple[str, int, int]:
        group, place = divmod(number, K * CHUNKS)
        return "F", place // K, group * K + place % K

    def backward(number: int) -> tuple[str, int, int]:
        _, chunk, batch = forward(number)
        return "B", CHUNKS - 1 - chunk, batch

    yield from map(forward, range(ahead))
    for number in range(total):
        if number + ahead < total:
            yield forward(number + ahead)
        yield backward(number)


# ---- Block-local: nothing comes back, and nobody waits but for input ----


def block_local(work: Work, steps: int, seed: int, *, depth: int = 4, barrier_every: int = 0) -> list[list[Op]]:
    """Let each rank go on as soon as it has its input.

    Args:
        work: What there is to be done.
        steps: Optimizer steps.
        seed: Seed of the jitter.
        depth: Messages that may wait between two ranks.
        barrier_every: Steps after which all ranks wait for each other; 0 for never.
    """
    clock, m = _Clock(work, seed), work.micro_batches
    ranks: list[list[Op]] = []
    for rank in range(work.blocks):
        backward = work.to_input + work.to_weights + (work.head * work.cycle if rank < work.blocks - 1 else 0.0)
        mine: list[Op] = []
        for step in range(steps):
            for number in range(step * m, step * m + m):
                arrival = (Need(("put", rank - 1, number), sender=rank - 1),) if rank > 0 else ()
                mine.append(Op(("take", rank, number), 0.0, arrival))
                mine.append(Op(("F", rank, number), clock(rank, work.forward)))
                room = (
                    (Need(("take", rank + 1, number - depth)),) if rank < work.blocks - 1 and number >= depth else ()
                )
                mine.append(Op(("put", rank, number), 0.0, room))
                mine.append(Op(("B", rank, number), clock(rank, backward)))
            mine.append(Op(("O", rank, step), clock(rank, work.optimizer)))
            if barrier_every and (step + 1) % barrier_every == 0:
                others = tuple(Need(("O", other, step)) for other in range(work.blocks))
                mine.append(Op(("barrier", rank, step), 0.0, others))
        ranks.append(mine)
    return ranks


def _bubble(work: Work, seconds: float) -> float:
    return work.micro_batches * work.cycle + (work.blocks - 1) * seconds + work.optimizer


GPIPE = Schedule("GPipe", _pipeline(_gpipe, 1), lambda work: _bubble(work, work.cycle))
ONE_F_ONE_B = Schedule("1F1B", _pipeline(_one_f_one_b, 1), lambda work: _bubble(work, work.cycle))
INTERLEAVED = Schedule(
    "interleaved",
    _pipeline(_interleaved, CHUNKS),
    lambda work: _bubble(work, work.cycle / CHUNKS),
    lambda work: work.micro_batches % work.blocks == 0,
)
ZERO_BUBBLE = Schedule(
    "ZB-H1",
    _pipeline(_zero_bubble, 1),
    lambda work: _bubble(work, work.forward + work.to_input - work.to_weights),
    lambda work: work.micro_batches >= work.blocks,
)
BLOCK_LOCAL = Schedule(
    "block-local",
    block_local,
    lambda work: work.micro_batches * work.cycle * (1 + (work.head if work.blocks > 1 else 0.0)) + work.optimizer,
)
SCHEDULES: Sequence[Schedule] = (GPIPE, ONE_F_ONE_B, INTERLEAVED, ZERO_BUBBLE, BLOCK_LOCAL)
