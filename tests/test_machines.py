"""Processes find out who has come before anybody is said to be out of reach."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist

from hf_blocklocal.errors import BlockPeerError
from hf_blocklocal.parallel import machines


@pytest.fixture
def as_first_of_three(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(machines, "_ARRIVAL", timedelta(milliseconds=50))
    return dist.HashStore()


def test_the_machine_of_each_process_is_told_by_rank(as_first_of_three):
    for rank in (2, 1):
        as_first_of_three.set(f"machine/{rank}", f"host{rank}")
    assert machines.machines_of_all(as_first_of_three) == [machines.machine_here(), "host1", "host2"]


def test_a_process_that_does_not_come_is_named_and_no_network_is_blamed(as_first_of_three):
    as_first_of_three.set("machine/1", "host1")
    with pytest.raises(BlockPeerError, match="Rank 2 of 3 has not made its trainer within"):
        machines.machines_of_all(as_first_of_three)
