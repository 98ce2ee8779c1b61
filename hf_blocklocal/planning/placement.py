"""Place the blocks of a model on devices: a cut by cost that fits in memory, and what each rank then does and holds.

Everything here is arithmetic on costs that somebody else has measured: no tensors, no devices, no Hugging Face.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from hf_blocklocal.cut.partition import Span, cheapest_spans, spans_from_boundaries
from hf_blocklocal.errors import PlacementError
from hf_blocklocal.planning.model_costs import ModelCosts


@dataclass(frozen=True)
class Device:
    """Where one block is to live.

    Attributes:
        memory_bytes: Memory that it may take; None where that is not to be looked at.
        speed: Operations per second, or in any other unit that is the same for all devices.
    """

    memory_bytes: int | None = None
    speed: float = 1.0


@dataclass(frozen=True)
class Upkeep:
    """What a rank holds and moves beside what a step costs.

    Attributes:
        states: Bytes of optimizer state per byte of weights: 2 for AdamW, 0 for plain SGD.
        in_flight: Boundary tensors that may wait on either side of a block.
        refresh_steps: Steps from one copy of borrowed layers to the next; 0 if they are never copied again.
        refresh_lag: Steps that a copy is old when it is taken into use.
        shared_by: Ranks that hold the same block and share out its layers.
    """

    states: float = 2.0
    in_flight: int = 4
    refresh_steps: int = 1
    refresh_lag: int = 0
    shared_by: int = 1

    def shared(self, sizes: Sequence[int]) -> int:
        """Return what a rank holds of layers of these sizes: a part of each, and one whole, which runs."""
        total = sum(sizes)
        return total if self.shared_by == 1 else math.ceil(total / self.shared_by) + max(sizes)

    @property
    def copies(self) -> int:
        """Copies of borrowed weights that exist at a time: the one in use, and those that wait."""
        waiting = math.ceil(self.refresh_lag / self.refresh_steps) if self.refresh_steps > 0 else 0
        return 1 + waiting


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. Temporaries of an operation and what an allocator wastes do not count.

    Attributes:
        weights: Parameters that the block owns or uses, its head included.
        gradients: Gradients of those that it trains, copies included.
        optimizer: Their optimizer state.
        activations: What autograd saves in the block.
        head: What autograd saves in its head, at the same time.
        copies: Borrowed weights of later blocks.
        stream: Boundary tensors that wait.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    copies: int
    stream: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Rank:
    """What one rank does and holds.

    Attributes:
        span: Its layers.
        parameters: Parameters that it trains, copies included.
        operations: Operations of a step.
        seconds: Time of a step, in the unit that goes with the speed of its device.
        memory: Bytes that it holds.
        bytes_up: Bytes that it sends to the next rank per step.
        bytes_down: Bytes of borrowed weights that it sends to the rank before, per step on average.
    """

    span: Span
    parameters: int
    operations: float
    seconds: float
    memory: Memory
    bytes_up: int
    bytes_down: float


@dataclass(frozen=True)
class Placement:
    """Which rank has which block.

    Attributes:
        ranks: One per block, in forward order.
    """

    ranks: tuple[Rank, ...]

    @property
    def boundaries(self) -> tuple[int, ...]:
        """First layer of every block but the first, as `BlockLocalConfig` takes them."""
        return tuple(rank.span.start for rank in self.ranks[1:])

    @property
    def seconds(self) -> float:
        """Time of a step: that of the slowest rank, since no rank waits for another one's gradient."""
        return max(rank.seconds for rank in self.ranks)

    @property
    def efficiency(self) -> float:
        """Share of the time that the ranks are busy: mean over slowest. What is missing to 1 is lost to imbalance."""
        return sum(rank.seconds for rank in self.ranks) / len(self.ranks) / self.seconds

    def describe(self, *, timed: bool = False) -> str:
        """Return the placement as a table, sizes in the unit that its head names.

        Args:
            timed: Whether the speed of the devices is in operations per second, so that there are times to be told.
        """
        memories = [rank.memory for rank in self.ranks]
        unit, size = unit_of(max(memory.total for memory in memories))
        kinds = [field.name for field in fields(Memory)]
        work = sum(rank.operations for rank in self.ranks)
        header = ["rank", "layers", "parameters", "work", "busy", *(["ms"] if timed else []), *kinds, f"total, {unit}"]
        traffic, amount = unit_of(max(max(rank.bytes_up, rank.bytes_down) for rank in self.ranks))
        rows = [[*header, f"up, {traffic}", "down"]]
        for number, (rank, memory) in enumerate(zip(self.ranks, memories, strict=True)):
            rows.append(
                [
                    str(number),
                    f"{rank.span.start}-{rank.span.last}",
                    f"{rank.parameters:,}",
                    f"{rank.operations / work:.1%}",
                    f"{rank.seconds / self.seconds:.0%}",
                    *([f"{1e3 * rank.seconds:.1f}"] if timed else []),
                    *(f"{getattr(memory, kind) / size:.2f}" for kind in kinds),
                    f"{memory.total / size:.2f}",
                    f"{rank.bytes_up / amount:.2f}",
                    f"{rank.bytes_down / amount:.2f}",
                ]
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def place(
    costs: ModelCosts, devices: Sequence[Device], upkeep: Upkeep | None = None, boundaries: Sequence[int] | None = None
) -> Placement:
    """Cut a model for devices such that the slowest is done as early as possible and every block fits.

    Args:
        costs: What the parts of the model cost.
        devices: One per block, in forward order.
        upkeep: What ranks hold beside.
        boundaries: First layer of every block but the first, where the cut is given and only needs to fit.

    Raises:
        CutError: If there are more devices than layers, or the boundaries do not fit the model.
        PlacementError: If the blocks do not fit in memory. The text says what is missing, and how many blocks fit.
    """
    upkeep = upkeep or Upkeep()
    num_layers = len(costs.layers)
    if boundaries is None:
        spans = cheapest_spans(num_layers, len(devices), _time_if_it_fits(costs, devices, upkeep))
    else:
        spans = spans_from_boundaries(num_layers, boundaries)
    missing = [_excess(costs, span, device, upkeep) for span, device in zip(spans, devices, strict=True)]
    if max(missing) > 0:
        raise _does_not_fit(costs, devices, upkeep, spans if boundaries is not None else None)
    return Placement(tuple(_ranks(costs, devices, upkeep, spans)))


def memory_of(costs: ModelCosts, span: Span, upkeep: Upkeep) -> Memory:
    """Return what a rank with these layers holds."""
    _, trained = costs.trained(span)
    held, learning = costs.inside(span)
    copied = costs.trained_copies(span)[1]
    elsewhere = sum(learning) - math.ceil(sum(learning) / upkeep.shared_by)
    edges = [edge for edge in (span.start - 1, span.last) if 0 <= edge < len(costs.heads)]
    return Memory(
        weights=trained + costs.frozen_bytes(span) + costs.foreign_bytes(span) - sum(held) + upkeep.shared(held),
        gradients=trained - sum(learning) + upkeep.shared(learning) + copied,
        optimizer=int((trained - elsewhere + copied) * upkeep.states),
        activations=costs.activations(span),
        head=costs.head_activations(span),
        copies=upkeep.copies * costs.borrowed_bytes([span.stop], span.stop),
        stream=upkeep.in_flight * sum(costs.layers[edge].message_bytes for edge in edges),
    )


def _ranks(costs: ModelCosts, devices: Sequence[Device], upkeep: Upkeep, spans: Sequence[Span]) -> list[Rank]:
    ranks = []
    for block, (span, device) in enumerate(zip(spans, devices, strict=True)):
        operations = costs.operations(span)
        # A weight passes each rank between its owner and the lowest head that borrows it once.
        below = [lower.stop for lower in spans[:block]]
        down = costs.borrowed_bytes(below, span.start)
        ranks.append(
            Rank(
                span=span,
                parameters=costs.trained(span)[0] + costs.trained_copies(span)[0],
                operations=operations,
                seconds=operations / device.speed,
                memory=memory_of(costs, span, upkeep),
                bytes_up=costs.layers[span.last].message_bytes if span.last < len(costs.heads) else 0,
                bytes_down=down / upkeep.refresh_steps if upkeep.refresh_steps > 0 else 0.0,
            )
        )
    return ranks


def _time_if_it_fits(costs: ModelCosts, devices: Sequence[Device], upkeep: Upkeep) -> Callable[[int, Span], float]:
    held: dict[Span, int] = {}

    def cost(block: int, span: Span) -> float:
        if span not in held:
            held[span] = memory_of(costs, span, upkeep).total
        limit = devices[block].memory_bytes
        return math.inf if limit is not None and held[span] > limit else costs.operations(span) / devices[block].speed

    return cost


def _excess(costs: ModelCosts, span: Span, device: Device, upkeep: Upkeep) -> int:
    return memory_of(costs, span, upkeep).total - device.memory_bytes if device.memory_bytes is not None else 0


def _does_not_fit(
    costs: ModelCosts, devices: Sequence[Device], upkeep: Upkeep, given: Sequence[Span] | None
) -> PlacementError:
    """Describe the cut that comes nearest to fitting, and look for a number of blocks that fits."""
    num_layers = len(costs.layers)
    spans = given or cheapest_spans(
        num_layers, len(devices), lambda block, span: _excess(costs, span, devices[block], upkeep)
    )
    excess, block = max(
        (_excess(costs, span, device, upkeep), block)
        for block, (span, device) in enumerate(zip(spans, devices, strict=True))
    )
    span, limit = spans[block], devices[block].memory_bytes
    what = f"These {len(devices)} blocks do not fit: " if given else f"No {len(devices)} blocks fit: at best, "
    return PlacementError(
        f"{what}block {block} (layers {span.start} to {span.last}) needs {sized(limit + excess)} and its device has "
        f"{sized(limit)}, {sized(excess)} too little. {_what_would_fit(costs, devices, upkeep)}"
    )


def _what_would_fit(costs: ModelCosts, devices: Sequence[Device], upkeep: Upkeep) -> str:
    smallest = min(devices, key=lambda device: device.memory_bytes or math.inf)
    num_layers = len(costs.layers)
    reached = {0}
    for count in range(1, num_layers + 1):
        reached = {
            stop
            for start in reached
            for stop in range(start + 1, num_layers + 1)
            if _excess(costs, Span(start, stop), smallest, upkeep) <= 0
        }
        if num_layers in reached:
            return f"num_blocks={count} would fit on devices of {sized(smallest.memory_bytes)} each."
    alone = max(memory_of(costs, Span(layer, layer + 1), upkeep).total for layer in range(num_layers))
    return (
        f"No num_blocks would fit: a block of one layer needs up to {sized(alone)}. Use a smaller batch, shorter "
        "sequences, an optimizer with less state, or fewer head_layers."
    )


def unit_of(size: float) -> tuple[str, int]:
    """Return the unit to write a number of bytes in, and how many bytes that is."""
    units = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
    return next(((name, unit) for name, unit in units if abs(size) >= unit), ("B", 1))


def sized(size: float) -> str:
    """Write a number of bytes for people."""
    name, unit = unit_of(size)
    return f"{size / unit:.2f} {name}"
