"""A process that waits for all others looks around meanwhile, and what one trainer says is not for another's ears."""

from __future__ import annotations

import atexit
import threading
import time

import pytest
import torch
import torch.distributed as dist

from hf_blocklocal.errors import BlockPeerError, UnsupportedSettingError
from hf_blocklocal.parallel.chain import form_chains
from hf_blocklocal.parallel.leaving import Leaving
from hf_blocklocal.parallel.meetings import Meetings
from hf_blocklocal.parallel.queues import check_queues


CPU = torch.device("cpu")


def nothing(*_):
    """See nobody missing."""


def test_what_processes_do_together_returns_what_it_returns():
    meetings = Meetings(nothing, nothing, CPU)
    assert meetings.run(lambda one, two: one + two, 1, two=2) == 3
    assert meetings.run(lambda: meetings.run(lambda: "within")) == "within"
    with torch.no_grad():
        assert not meetings.run(torch.is_grad_enabled)


def test_who_waits_in_vain_is_told_so():
    looks = []

    def look_around():
        looks.append(time.monotonic())
        if len(looks) == 2:
            raise BlockPeerError("Block 1 is gone.")

    meetings, never = Meetings(look_around, nothing, CPU), threading.Event()
    with pytest.raises(BlockPeerError, match=r"Block 1 is gone\."):
        meetings.run(never.wait)
    never.set()


def test_an_error_is_explained_by_who_is_missing_and_else_told_as_it_is():
    def explain(error):
        if "reset" in str(error):
            raise BlockPeerError("Block 1 is gone.")

    def fail(error):
        raise error

    meetings = Meetings(nothing, explain, CPU)
    with pytest.raises(BlockPeerError, match=r"Block 1 is gone\."):
        meetings.run(fail, RuntimeError("reset by peer"))
    with pytest.raises(KeyError, match="no such column"):
        meetings.run(fail, KeyError("no such column"))


@pytest.fixture
def alone():
    """Make this process the only one of its kind."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    chains = []

    def chain():
        chains.append(form_chains(1, CPU, peer_timeout=5.0))
        return chains[-1]

    yield chain
    for made in chains:
        made.peers.stop()
        atexit.unregister(made.leave)
    dist.destroy_process_group()


def test_every_group_in_which_gpus_meet_is_connected_at_the_start(alone, monkeypatch):
    connected, add_up = [], dist.all_reduce

    def note(tensor, group):
        connected.append(group)
        add_up(tensor, group=group)

    monkeypatch.setattr(dist, "all_reduce", note)
    chain = alone()
    assert connected == [dist.group.WORLD, chain.replicas, chain.blocks]


def test_a_single_process_on_a_cpu_is_told_how_to_be_several():
    with pytest.raises(UnsupportedSettingError, match="there are 1 process.*With --cpu, accelerate starts a single"):
        form_chains(2, CPU, peer_timeout=5.0)
    with pytest.raises(UnsupportedSettingError) as error:
        form_chains(2, torch.device("cuda", 0), peer_timeout=5.0)
    assert "--cpu" not in str(error.value)


@pytest.mark.parametrize("connections", [None, "8", "1"])
def test_a_gpu_with_a_single_queue_is_refused(connections, monkeypatch):
    if connections is not None:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)
    check_queues(CPU, 2)
    if connections != "1":
        check_queues(torch.device("cuda", 0), 2)
        return
    with pytest.raises(UnsupportedSettingError, match="CUDA_DEVICE_MAX_CONNECTIONS=1 and a block per process exclude"):
        check_queues(torch.device("cuda", 0), 2)


@pytest.mark.parametrize(
    ("blocks", "connections", "warned"), [(2, None, 0), (3, None, 1), (3, "8", 1), (3, "4", 1), (3, "32", 0)]
)
def test_more_streams_than_queues_are_warned_of(blocks, connections, warned, monkeypatch, caplog):
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    if connections is not None:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)
    check_queues(torch.device("cuda", 0), blocks)
    assert len(caplog.records) == warned
    assert all("CUDA_DEVICE_MAX_CONNECTIONS=32" in record.message for record in caplog.records)


def test_trainers_of_one_process_do_not_hear_each_others_failures(alone):
    first, second = alone(), alone()
    first.peers.report(ValueError("no such file"))
    with pytest.raises(BlockPeerError, match="ValueError: no such file"):
        first.together(time.sleep, 30)
    assert second.together(lambda: "goes on") == "goes on"
    second.peers.check_all()
    first.peers.tell_to_stop()
    assert first.peers.stop_at(3, decides=True) == 3
    assert first.peers.stop_at(4, decides=True) == 3
    assert not second.peers.told_to_stop
    assert second.peers.stop_at(9, decides=True) is None


def test_who_cannot_be_reached_is_told_which_setting_says_how(alone, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Gloo connectFullMesh failed: Connection refused, remote=[127.0.1.1]:52124")

    monkeypatch.setattr(dist, "new_group", refuse)
    with pytest.raises(BlockPeerError, match=r"(?s)Rank 0 on .* Connection refused.* set GLOO_SOCKET_IFNAME"):
        alone()


def test_a_run_in_a_thread_of_its_own_takes_no_signals(alone):
    entered = []

    def run():
        with Leaving(alone(), save=True) as leaving:
            entered.append(leaving.due(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert entered == [False]
