"""A stack is cut without gap or overlap, evenly, by hand or by cost."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from hf_blocklocal.cut.partition import Span, boundaries_within_runs, cheapest_spans, even_spans, spans_from_boundaries
from hf_blocklocal.errors import CutError


def covers(spans, num_layers):
    """Tell whether the spans hold every layer once, in order, and none of them is empty."""
    return [layer for span in spans for layer in range(span.start, span.stop)] == list(range(num_layers)) and all(
        len(span) > 0 for span in spans
    )


def costliest(costs, spans):
    return max(sum(costs[span.start : span.stop]) for span in spans)


def every_cut(num_layers, num_blocks):
    for boundaries in combinations(range(1, num_layers), num_blocks - 1):
        yield [Span(start, stop) for start, stop in pairwise([0, *boundaries, num_layers])]


def test_a_span_knows_its_layers():
    span = Span(2, 5)
    assert (len(span), span.last) == (3, 4)
    assert [layer for layer in range(8) if layer in span] == [2, 3, 4]


@pytest.mark.parametrize("num_layers", range(1, 14))
def test_an_even_cut_covers_all_layers_in_blocks_that_differ_by_at_most_one(num_layers):
    for num_blocks in range(1, num_layers + 1):
        spans = even_spans(num_layers, num_blocks)
        sizes = [len(span) for span in spans]
        assert len(spans) == num_blocks
        assert covers(spans, num_layers)
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("lengths", "num_blocks", "expected"),
    [
        ([4], 1, ()),
        ([2, 2], 2, (2,)),
        ([2, 2], 3, (1, 2)),
        ([1, 5], 3, (1, 3)),
        ([5, 1, 3], 5, (2, 5, 6, 7)),
    ],
)
def test_runs_are_cut_further_where_blocks_are_largest(lengths, num_blocks, expected):
    assert boundaries_within_runs(lengths, num_blocks) == expected


@pytest.mark.parametrize(("lengths", "num_blocks"), [([2, 2], 1), ([1, 1, 1], 2), ([2, 2], 5)])
def test_a_block_reaches_over_no_two_runs_and_has_a_layer(lengths, num_blocks):
    with pytest.raises(CutError, match="Cannot cut"):
        boundaries_within_runs(lengths, num_blocks)


def test_the_later_of_two_uneven_blocks_is_the_larger():
    assert even_spans(5, 2) == [Span(0, 2), Span(2, 5)]


@pytest.mark.parametrize("boundaries", [(), (1,), (3,), (1, 2, 3), (2, 3)])
def test_every_boundary_opens_a_block(boundaries):
    spans = spans_from_boundaries(4, boundaries)
    assert covers(spans, 4)
    assert [span.start for span in spans] == [0, *boundaries]


@pytest.mark.parametrize("boundaries", [(0,), (4,), (5,), (-1,), (2, 2), (3, 1), (1, 9)])
def test_boundaries_that_cannot_be_are_refused_beside_those_that_can(boundaries):
    with pytest.raises(CutError) as error:
        spans_from_boundaries(4, boundaries)
    assert str(error.value) == (
        f"Cannot cut 4 layers at boundaries {list(boundaries)}: each is the first layer of a block, so they must "
        "ascend strictly and lie between 1 and 3."
    )


def spans_by_cost(costs, num_blocks):
    return cheapest_spans(len(costs), num_blocks, lambda _block, span: sum(costs[span.start : span.stop]))


@pytest.mark.parametrize("seed", range(20))
def test_no_cut_has_a_cheaper_costliest_block_than_the_one_by_cost(seed):
    draw = random.Random(seed)
    costs = [draw.randint(0, 9) for _ in range(draw.randint(1, 8))]
    for num_blocks in range(1, len(costs) + 1):
        spans = spans_by_cost(costs, num_blocks)
        assert len(spans) == num_blocks
        assert covers(spans, len(costs))
        assert costliest(costs, spans) == min(costliest(costs, cut) for cut in every_cut(len(costs), num_blocks))


def test_layers_of_equal_cost_are_cut_evenly():
    assert [len(span) for span in spans_by_cost([2.0] * 9, 3)] == [3, 3, 3]


def test_a_costly_layer_stands_alone():
    assert spans_by_cost([1, 1, 10, 1, 1], 3) == [Span(0, 2), Span(2, 3), Span(3, 5)]


@pytest.mark.parametrize("num_blocks", [0, -1, 5])
@pytest.mark.parametrize(
    "cut",
    [lambda blocks: even_spans(4, blocks), lambda blocks: spans_by_cost([1.0] * 4, blocks)],
    ids=["even", "cost"],
)
def test_a_block_without_a_layer_is_refused(cut, num_blocks):
    with pytest.raises(CutError) as error:
        cut(num_blocks)
    assert str(error.value) == (
        f"Cannot cut 4 layers into {num_blocks} blocks: every block needs a layer. Choose num_blocks between 1 and 4."
    )
