"""Cut a stack of layers into contiguous blocks.

Everything here is arithmetic on layer indices: no tensors, no devices, no Hugging Face.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from hf_blocklocal.errors import CutError


@dataclass(frozen=True)
class Span:
    """The layers `start`, ..., `stop - 1` of the model, in the order of execution."""

    start: int
    stop: int

    @property
    def last(self) -> int:
        """Index of the last layer of the span."""
        return self.stop - 1

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, layer: int) -> bool:
        return self.start <= layer < self.stop


def even_spans(num_layers: int, num_blocks: int) -> list[Span]:
    """Cut a stack into blocks whose sizes differ by at most one layer.

    Args:
        num_layers: Layers in the stack.
        num_blocks: Blocks to cut it into.

    Returns:
        One span per block, in forward order, without gap or overlap.

    Raises:
        CutError: If a block would be left without a layer.
    """
    _check_enough_layers(num_layers, num_blocks)
    edges = [num_layers * block // num_blocks for block in range(num_blocks + 1)]
    return [Span(start, stop) for start, stop in pairwise(edges)]


def spans_from_boundaries(num_layers: int, boundaries: Sequence[int]) -> list[Span]:
    """Cut a stack in front of the given layers.

    Args:
        num_layers: Layers in the stack.
        boundaries: First layer of every block but the first, in ascending order.

    Returns:
        One span per block, `len(boundaries) + 1` in all.

    Raises:
        CutError: If the boundaries are not strictly ascending between 1 and `num_layers - 1`.
    """
    edges = [0, *boundaries, num_layers]
    if any(start >= stop for start, stop in pairwise(edges)):
        raise CutError(
            f"Cannot cut {num_layers} layers at boundaries {list(boundaries)}: each is the first layer of a block, so "
            f"they must ascend strictly and lie between 1 and {num_layers - 1}."
        )
    return [Span(start, stop) for start, stop in pairwise(edges)]


def boundaries_within_runs(lengths: Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """Cut runs of layers that must not share a block, such as those on different devices, evenly into blocks.

    Args:
        lengths: Layers of each run, in forward order.
        num_blocks: Blocks in all, at least one per run.

    Returns:
        The first layer of every block but the first.

    Raises:
        CutError: If there are fewer blocks than runs, or a block would be left without a layer.
    """
    _check_enough_layers(sum(lengths), num_blocks)
    if num_blocks < len(lengths):
        raise CutError(
            f"Cannot cut {len(lengths)} runs of layers into {num_blocks} blocks: none may reach over two of them. Use "
            f"num_blocks={len(lengths)} or more."
        )
    blocks = [1] * len(lengths)
    for _ in range(num_blocks - len(lengths)):
        fullest = max(range(len(lengths)), key=lambda run: (lengths[run] / blocks[run], -run))
        blocks[fullest] += 1
    starts = [0, *accumulate(lengths)]
    spans = [
        Span(start + span.start, start + span.stop)
        for start, length, count in zip(starts, lengths, blocks, strict=False)
        for span in even_spans(length, count)
    ]
    return tuple(span.start for span in spans[1:])


def cheapest_spans(num_layers: int, num_blocks: int, cost: Callable[[int, Span], float]) -> list[Span]:
    """Cut a stack so that the costliest block is as cheap as possible, where a cost is of a block as a whole.

    Args:
        num_layers: Layers in the stack.
        num_blocks: Blocks to cut it into.
        cost: Cost of the block of that number if it has these layers; infinite where it cannot have them.

    Returns:
        One span per block, in forward order, without gap or overlap; the same for the same costs.

    Raises:
        CutError: If a block would be left without a layer.
    """
    _check_enough_layers(num_layers, num_blocks)
    # best[stop] = (costliest block, edges) over all cuts of the first `stop` layers into the blocks so far
    best = {stop: (cost(0, Span(0, stop)), [0, stop]) for stop in range(1, num_layers + 1)}
    for block in range(1, num_blocks):
        best = {
            stop: min(
                (max(best[start][0], cost(block, Span(start, stop))), [*best[start][1], stop])
                for start in range(block, stop)
            )
            for stop in range(block + 1, num_layers + 1)
        }
    return [Span(start, stop) for start, stop in pairwise(best[num_layers][1])]


def _check_enough_layers(num_layers: int, num_blocks: int) -> None:
    if not 1 <= num_blocks <= num_layers:
        raise CutError(
            f"Cannot cut {num_layers} layers into {num_blocks} blocks: every block needs a layer. "
            f"Choose num_blocks between 1 and {num_layers}."
        )
