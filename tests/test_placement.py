"""Blocks are placed such that the slowest device is as fast as memory allows, and the bill of each rank adds up."""

from __future__ import annotations

import random
import re
from dataclasses import fields
from itertools import combinations

import pytest

from hf_blocklocal.cut.partition import Span, spans_from_boundaries
from hf_blocklocal.errors import CutError, PlacementError
from hf_blocklocal.planning.model_costs import HeadCosts, LayerCosts, ModelCosts, Weight
from hf_blocklocal.planning.placement import Device, Memory, Upkeep, memory_of, place


MIB = 2**20


def layer(work=30.0, saved=10 * MIB, message=MIB):
    return LayerCosts(work / 3, 2 * work / 3, work / 3, saved, 2 * saved, message)


def head(work=3.0, saved=MIB, borrows=()):
    return HeadCosts(work, work, saved, saved, 5, 20, frozenset(borrows))


def model(layers, heads=None, weights=None):
    heads = heads or [head() for _ in layers[1:]]
    weights = weights or {f"layer.{index}": Weight(MIB, 4 * MIB, True, (index,)) for index in range(len(layers))}
    return ModelCosts(tuple(layers), tuple(heads), weights)


def random_model(seed, num_layers=7):
    draw = random.Random(seed)
    return model(
        [layer(draw.randint(1, 60), draw.randint(1, 20) * MIB, draw.randint(1, 3) * MIB) for _ in range(num_layers)],
        [head(draw.randint(0, 9), draw.randint(0, 3) * MIB) for _ in range(num_layers - 1)],
        {f"layer.{index}": Weight(1, draw.randint(1, 9) * MIB, True, (index,)) for index in range(num_layers)},
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_no_cut_that_fits_is_faster(seed, blocks):
    costs = random_model(seed)
    devices = [Device((60 + 20 * number) * MIB, 1 + number % 2) for number in range(blocks)]
    cuts = [spans_from_boundaries(7, edges) for edges in combinations(range(1, 7), blocks - 1)]
    times = [
        max(costs.operations(span) / device.speed for span, device in zip(cut, devices, strict=True))
        for cut in cuts
        if all(
            memory_of(costs, span, Upkeep()).total <= device.memory_bytes
            for span, device in zip(cut, devices, strict=True)
        )
    ]
    if times:
        assert place(costs, devices).seconds == min(times)
    else:
        with pytest.raises(PlacementError):
            place(costs, devices)


def test_a_layer_that_opens_a_block_and_a_head_have_costs_of_their_own():
    costs = model([layer(30), layer(30), layer(30)])
    assert costs.operations(Span(0, 1)) == 10 + 10 + 3
    assert costs.operations(Span(0, 2)) == 20 + 10 + 20 + 3
    assert costs.operations(Span(1, 3)) == 20 + 10 + 20
    assert costs.activations(Span(0, 2)) == 30 * MIB


def test_a_head_in_the_first_block_may_cost_more():
    heads = [HeadCosts(1, 4, 10, 40, 0, 0), HeadCosts(1, 4, 10, 40, 0, 0)]
    costs = model([layer(0), layer(0), layer(0)], heads)
    assert (costs.operations(Span(0, 2)), costs.operations(Span(1, 2))) == (4, 1)
    assert (costs.head_activations(Span(0, 2)), costs.head_activations(Span(1, 2))) == (40, 10)
    assert costs.head_activations(Span(1, 3)) == 0


def test_memory_moves_the_cut_away_from_the_fastest():
    layers = [layer(saved=30 * MIB), *[layer(saved=5 * MIB)] * 5]
    free = place(model(layers), [Device(), Device()])
    tight = place(model(layers), [Device(110 * MIB), Device(200 * MIB)])
    assert free.boundaries == (3,)
    assert tight.boundaries == (2,)
    assert tight.efficiency < free.efficiency


def test_efficiency_is_mean_over_slowest():
    placement = place(model([layer(30), layer(60)], [head(0)]), [Device(), Device()])
    assert placement.seconds == 40
    assert placement.efficiency == pytest.approx(30 / 40)


def test_faster_devices_get_more_layers():
    costs = model([layer()] * 8)
    assert place(costs, [Device(speed=1.0), Device(speed=3.0)]).boundaries == (2,)


def test_the_memory_of_a_rank_adds_up():
    placement = place(model([layer()] * 4), [Device(), Device()], Upkeep(states=2, in_flight=3), [1])
    memory = placement.ranks[1].memory
    assert memory == Memory(
        weights=12 * MIB,
        gradients=12 * MIB,
        optimizer=24 * MIB,
        activations=40 * MIB,
        head=0,
        copies=0,
        stream=3 * MIB,
    )
    assert memory.total == sum(getattr(memory, field.name) for field in fields(memory)) == 91 * MIB
    assert placement.ranks[0].memory.weights == 4 * MIB + 20
    assert [rank.bytes_up for rank in placement.ranks] == [MIB, 0]


def test_layers_that_are_shared_out_leave_a_part_and_the_one_that_runs():
    weights = {f"layer.{index}": Weight(MIB, 4 * MIB, True, (index,), inside=True) for index in range(4)}
    weights["embedding"] = Weight(MIB, 6 * MIB, True, (0,))
    weights["layer.1.frozen"] = Weight(MIB, 8 * MIB, False, (1,), inside=True)
    heads = [HeadCosts(0, 0, 0, 0, 0, 0)] * 3
    alone, shared = (
        memory_of(model([layer()] * 4, heads, weights), Span(0, 2), Upkeep(states=2, shared_by=replicas))
        for replicas in (1, 4)
    )
    assert (alone.weights, alone.gradients, alone.optimizer) == (22 * MIB, 14 * MIB, 28 * MIB)
    assert shared.weights == (6 + 16 / 4 + 12) * MIB
    assert shared.gradients == (6 + 8 / 4 + 4) * MIB
    assert shared.optimizer == 2 * (6 + 8 / 4) * MIB
    assert shared.activations == alone.activations


def test_a_tied_weight_lies_on_both_ranks_and_is_trained_by_the_later():
    weights = {f"layer.{index}": Weight(1, 0, True, (index,)) for index in range(3)} | {
        "tied": Weight(100, 400, True, (0, 2))
    }
    heads = [HeadCosts(0, 0, 0, 0, 0, 0)] * 2
    placement = place(model([layer()] * 3, heads, weights), [Device()] * 3)
    assert [rank.parameters for rank in placement.ranks] == [1, 1, 101]
    assert [rank.memory.weights for rank in placement.ranks] == [400, 0, 400]
    assert [rank.memory.optimizer for rank in placement.ranks] == [0, 0, 800]


def test_a_frozen_weight_needs_neither_gradient_nor_state():
    weights = {f"layer.{index}": Weight(1, 100, index == 0, (index,)) for index in range(2)}
    placement = place(model([layer()] * 2, [HeadCosts(0, 0, 0, 0, 0, 0)], weights), [Device()] * 2)
    assert [rank.parameters for rank in placement.ranks] == [1, 0]
    assert [(rank.memory.weights, rank.memory.gradients) for rank in placement.ranks] == [(100, 100), (100, 0)]


def test_borrowed_weights_pass_each_rank_once_and_are_kept_as_copies():
    weights = {f"layer.{index}": Weight(1, 100, True, (index,)) for index in range(4)}
    heads = [
        HeadCosts(0, 0, 0, 0, 0, 0, frozenset(names)) for names in [("layer.2", "layer.3"), ("layer.3",), ("layer.3",)]
    ]
    costs = model([layer()] * 4, heads, weights)
    placement = place(costs, [Device()] * 4, Upkeep(refresh_steps=10, refresh_lag=4))
    # Rank 3 sends layer 3, rank 2 hands it on with layer 2, and rank 1 hands both on.
    assert [rank.bytes_down for rank in placement.ranks] == [0, 20, 20, 10]
    assert [rank.memory.copies for rank in placement.ranks] == [400, 200, 200, 0]


@pytest.mark.parametrize(("steps", "lag", "copies"), [(1, 0, 1), (0, 0, 1), (10, 4, 2), (1, 4, 5), (4, 8, 3)])
def test_copies_that_wait_are_counted(steps, lag, copies):
    assert Upkeep(refresh_steps=steps, refresh_lag=lag).copies == copies


def test_copies_that_are_never_taken_again_do_not_travel():
    costs = model([layer()] * 2, [head(borrows=["layer.1"])])
    assert place(costs, [Device()] * 2, Upkeep(refresh_steps=0)).ranks[1].bytes_down == 0


def test_what_does_not_fit_is_refused_with_what_is_missing_and_what_would_fit():
    costs = model([layer()] * 8)
    limit = 100 * MIB
    with pytest.raises(PlacementError) as error:
        place(costs, [Device(limit)] * 2)
    text = str(error.value)
    needed, given, missing = (float(number) for number in re.findall(r"([\d.]+) MiB", text)[:3])
    assert given == 100
    assert missing == pytest.approx(needed - given, abs=0.02)
    assert missing > 0
    fits = int(re.search(r"num_blocks=(\d+) would fit", text)[1])
    place(costs, [Device(limit)] * fits)
    with pytest.raises(PlacementError):
        place(costs, [Device(limit)] * (fits - 1))


def test_given_boundaries_that_do_not_fit_are_refused_beside_those_that_do():
    costs = model([layer()] * 8)
    devices = [Device(170 * MIB)] * 2
    assert place(costs, devices, boundaries=[4]).boundaries == (4,)
    with pytest.raises(PlacementError, match=r"These 2 blocks do not fit: block 1 \(layers 1 to 7\) needs"):
        place(costs, devices, boundaries=[1])


def test_a_layer_too_large_for_any_device_is_named_as_such():
    with pytest.raises(PlacementError, match="No num_blocks would fit: a block of one layer needs up to"):
        place(model([layer()] * 4), [Device(MIB)] * 2)


def test_more_devices_than_layers_are_refused():
    with pytest.raises(CutError, match="between 1 and 2"):
        place(model([layer()] * 2), [Device()] * 3)


def test_the_table_has_a_row_per_rank_and_times_only_where_they_mean_something():
    placement = place(model([layer()] * 4), [Device(speed=1e3)] * 2)
    header, *rows = placement.describe().splitlines()
    assert header.split() == [
        *("rank", "layers", "parameters", "work", "busy", "weights", "gradients", "optimizer", "activations", "head"),
        *("copies", "stream", "total,", "MiB", "up,", "MiB", "down"),
    ]
    assert [row.split()[:2] for row in rows] == [["0", "0-1"], ["1", "2-3"]]
    assert "ms" in placement.describe(timed=True).splitlines()[0].split()
