"""What is not waiting is work."""

from __future__ import annotations

import pytest

from hf_blocklocal.records.history import Timeline
from hf_blocklocal.records.lane import STEPS, Lane, work_between


@pytest.mark.parametrize(
    ("waits", "work"),
    [
        ([], [(10, 20)]),
        ([(12, 13)], [(10, 12), (13, 20)]),
        ([(9, 11), (19, 25)], [(11, 19)]),
        ([(15, 16), (12, 13)], [(10, 12), (13, 15), (16, 20)]),
        ([(12, 15), (13, 14), (14, 16)], [(10, 12), (16, 20)]),
        ([(0, 10), (20, 30)], [(10, 20)]),
        ([(5, 25)], []),
        ([(12, 12.0005)], [(10, 20)]),
    ],
    ids=["none", "one", "over the ends", "in disorder", "overlapping", "outside", "all of it", "too short to show"],
)
def test_work_is_what_is_left_of_a_step_without_its_waiting(waits, work):
    assert work_between(10, 20, waits) == work


def test_a_lane_tells_the_last_steps():
    moments, waits = iter(range(1000)), []
    lane = Lane(2, lambda: waits, now=lambda: float(next(moments)))
    for step in range(1, STEPS + 4):
        lane.begin()
        began = 2 * step - 1
        waits.append((began + 0.25, began + 0.5))
        lane.end(step)
    rows = lane.rows()
    assert sorted({row.step for row in rows}) == list(range(4, STEPS + 4))
    assert rows[:2] == [Timeline(4, 2, 7.0, 7.25), Timeline(4, 2, 7.5, 8.0)]
