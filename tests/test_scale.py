"""The simulator of many ranks says what arithmetic says where that can say anything, and shows what it cannot."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from test_configs import script


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "benchmarks"))

from schedules import (  # noqa: E402
    BLOCK_LOCAL,
    GPIPE,
    ONE_F_ONE_B,
    SCHEDULES,
    Work,
    block_local,
)
from simulator import Need, Network, Op, play  # noqa: E402


def seconds(schedule, work, steps=6):
    return schedule.step_seconds(work, steps=4 * work.blocks + 8 if schedule is BLOCK_LOCAL else steps)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
def test_alike_ranks_take_the_time_of_the_closed_form(schedule):
    tried = 0
    for blocks in (2, 4, 8, 16):
        for micro_batches in (1, 2, 4, 16, 32):
            work = Work(blocks, micro_batches, optimizer=0.3, head=0.1)
            if schedule.fits(work):
                tried += 1
                assert seconds(schedule, work) == pytest.approx(schedule.closed(work)), (blocks, micro_batches)
    assert tried >= 8


def test_passes_of_unequal_length_take_the_time_of_the_closed_form_too():
    work = Work(4, 8, forward=1.0, to_input=1.5, to_weights=0.75)
    for schedule in (GPIPE, ONE_F_ONE_B, BLOCK_LOCAL):
        assert seconds(schedule, work) == pytest.approx(schedule.closed(work))


def test_a_stream_is_as_fast_as_its_slowest_rank_whatever_the_latency():
    work = Work(4, pace=(1.0, 1.4, 1.0, 1.0), network=Network(transfer=0.5, latency=20.0))
    deep = replace(BLOCK_LOCAL, ops=partial(block_local, depth=10))
    assert deep.step_seconds(work, steps=80) == pytest.approx(1.4 * work.cycle)
    pipeline = replace(work, micro_batches=8)
    assert ONE_F_ONE_B.efficiency(pipeline) < 0.25 < deep.efficiency(work, steps=80)


def test_a_stream_is_bound_by_its_links_where_they_are_slower_than_ranks():
    work = Work(4, network=Network(transfer=5.0))
    assert BLOCK_LOCAL.step_seconds(work, steps=80) == pytest.approx(5.0)


@pytest.mark.parametrize("blocks", [4, 8])
def test_a_barrier_every_step_puts_the_bubble_back(blocks):
    # A step then takes the forward passes of all ranks and the backward pass of the last.
    barred = replace(BLOCK_LOCAL, ops=partial(block_local, barrier_every=1))
    assert barred.efficiency(Work(blocks), steps=20) == pytest.approx(3 / (blocks + 2))


def test_deeper_queues_even_out_jitter():
    efficiencies = [
        replace(BLOCK_LOCAL, ops=partial(block_local, depth=depth)).efficiency(Work(8, jitter=0.4), steps=200)
        for depth in (1, 2, 4)
    ]
    assert efficiencies == sorted(efficiencies)
    assert efficiencies[0] < efficiencies[2] - 0.02


def test_jitter_keeps_the_mean():
    work = Work(1, jitter=0.3)
    assert BLOCK_LOCAL.step_seconds(work, steps=4000) == pytest.approx(work.cycle, rel=0.02)


def test_a_queue_holds_no_more_than_its_depth():
    slow_last = Work(2, pace=(1.0, 3.0))
    ends = play(block_local(slow_last, 30, 0, depth=2)).ends
    for number in range(2, 30):
        assert ends["put", 0, number] >= ends["take", 1, number - 2]
    assert ends["put", 0, 29] > 60


def test_messages_of_a_link_go_one_after_the_other():
    sender = [Op("a", 1.0), Op("b", 0.0)]
    receiver = [Op("c", 1.0, (Need("a", sender=0),)), Op("d", 1.0, (Need("b", sender=0),))]
    outcome = play([sender, receiver], Network(transfer=4.0, latency=0.5))
    assert outcome.ends["c"] == 1 + 4 + 0.5 + 1
    assert outcome.ends["d"] == 1 + 4 + 4 + 0.5 + 1
    assert outcome.busy == [1, 2]
    assert outcome.seconds == outcome.ends["d"]


def test_ranks_that_wait_in_a_circle_are_named():
    with pytest.raises(ValueError, match="wait for ever: {0: 'a', 1: 'b'}"):
        play([[Op("a", 1.0, (Need("b"),))], [Op("b", 1.0, (Need("a"),))]])


def test_measured_points_are_put_beside_simulated_ones():
    scale = script("benchmarks/scale")
    point = {"schedule": "block-local", "blocks": 2, "forward": 1, "to_input": 1, "to_weights": 1, "step_seconds": 3.2}
    near, far = scale.compare([point, point | {"step_seconds": 4.0, "schedule": "1F1B", "micro_batches": 1}])
    assert near["deviation"] == pytest.approx(3 / 3.2 - 1)
    assert near["within 10 %"]
    assert far["simulated s"] == pytest.approx(6)
    assert not far["within 10 %"]
    with pytest.raises(SystemExit, match="unknown fields"):
        scale.compare([point | {"colour": 3}])


def test_points_are_read_from_the_reports_of_other_benchmarks():
    scale = script("benchmarks/scale")
    settings = {"seconds": 1.0, "head": 0.1}
    row = {"schedule": "1F1B", "K": 2, "m": 1, "seconds": [6.2, 6.1, 6.3]}
    skipped = [row | {"schedule": "DualPipeV"}, row | {"schedule": "interleaved"}, row | {"seconds": None}]
    emulated = {"settings": settings, "rows": [row, row | {"schedule": "block-local", "seconds": [3.5]}, *skipped]}
    pipeline, stream = scale.compare(scale.points_of(emulated))
    assert [pipeline["simulated s"], pipeline["measured s"]] == pytest.approx([6.0, 6.2])
    assert [stream["simulated s"], stream["measured s"]] == pytest.approx([3.3, 3.5])

    told = [{"wall": 2.1, "processor": 1.5}, {"wall": 2.0, "processor": 2.0}]
    way = {"way": "block-local, 2 processes", "processes": 2, "waited": [0.0, 0.0], "rounds": [told] * 3}
    others = [way | {"way": "block-local, 4 processes", "processes": 4}, way | {"way": "backpropagation, 2 processes"}]
    real = {"machine": {"cores": 2}, "results": [way, *others]}
    (point,) = scale.compare(scale.points_of(real))
    assert [point["simulated s"], point["measured s"]] == pytest.approx([2.0, 2.1])
    assert scale.points_of([{"blocks": 2}]) == [{"blocks": 2}]


def test_the_committed_results_are_what_the_simulator_says():
    scale = script("benchmarks/scale")
    report = json.loads((scale.HERE / "results" / "scale-cpu.json").read_text(encoding="utf-8"))
    rows = [row for row in report["ranks"] if row["K"] <= 8 and row["m"] <= 8]
    assert len(rows) == 9
    for row in rows:
        work = Work(row["K"], row["m"], optimizer=scale.OPTIMIZER, head=scale.HEAD)
        assert {name: row[name] for name in scale.efficiencies(work)} == pytest.approx(scale.efficiencies(work))
    assert (scale.HERE / "results" / "scale.png").stat().st_size > 10_000
    assert all(point["within 10 %"] for point in report["measured"])


def test_efficiencies_are_drawn(tmp_path):
    rows = list(islice(script("benchmarks/scale").by_ranks(), 10))
    assert script("benchmarks/scale_plot").draw(rows, tmp_path / "scale.png").stat().st_size > 10_000
