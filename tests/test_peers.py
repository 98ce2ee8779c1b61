"""Processes say that they are alive until they are about to end, and notice when nobody can hear it any more."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from hf_blocklocal.errors import BlockPeerError
from hf_blocklocal.parallel import peers


class SlowStore:
    """A store that takes its time, and knows whether it is being written to."""

    def __init__(self):
        self.writing, self.written = False, 0

    def clone(self):
        return self

    def check(self, keys):
        return False

    def set(self, key, value):
        self.writing = True
        time.sleep(0.1)
        self.written += 1
        self.writing = False


def test_whoever_has_said_no_more_is_not_in_the_middle_of_a_word(monkeypatch):
    """Or the interpreter is aborted where it ends: a thread in foreign code cannot be ended otherwise."""
    monkeypatch.setattr(peers, "_BEAT", 1e-3)
    store = SlowStore()
    talking = peers.Peers(store, rank=0, names=["Block 0"], timeout=4.0)
    while not store.writing:
        time.sleep(1e-3)
    talking.stop()
    assert not store.writing
    said = store.written
    time.sleep(0.2)
    assert store.written == said


class LostStore:
    """A store that cannot be reached any more."""

    def __init__(self, answer):
        self._answer = answer

    def clone(self):
        return self

    def set(self, key, value):
        self._answer()

    def compare_set(self, key, expected, value):
        return self._answer()

    def check(self, keys):
        return self._answer()


def test_a_store_that_is_gone_is_told_as_the_launcher_that_kept_it():
    def refuse():
        raise dist.DistNetworkError("Connection reset by peer")

    talking = peers.Peers(LostStore(refuse), rank=0, names=["Block 0 (rank 0)"], timeout=4.0)
    with pytest.raises(BlockPeerError, match=r"launcher of the first machine.*Connection reset by peer.*Block 0"):
        talking.check_all()
    talking.report(ValueError("what happened here is told, though nobody else can hear it"))
    talking.stop()


def test_a_store_that_does_not_answer_is_not_waited_for_without_end():
    network_is_back = threading.Event()
    talking = peers.Peers(LostStore(network_is_back.wait), rank=0, names=["Block 0 (rank 0)"], timeout=0.3)
    for _ in range(2):
        with pytest.raises(BlockPeerError, match=r"launcher of the first machine.*has not answered for 0 s"):
            talking.check_all()
    network_is_back.set()
    talking.stop()


def test_all_name_the_process_that_was_missed_first():
    """One that has ended because of another is not to be taken for the cause."""
    store, names = dist.HashStore(), [f"Block {block} (rank {block})" for block in range(3)]
    lower, middle = (peers.Peers(store, rank=rank, names=names, timeout=0.5) for rank in (0, 1))
    middle.check(2)
    time.sleep(0.6)
    with pytest.raises(BlockPeerError, match=r"^Block 2 \(rank 2\) has shown no sign of life .* Block 1"):
        middle.check(2)
    with pytest.raises(BlockPeerError, match=r"^Block 2 \(rank 2\) has shown no sign of life .* Block 0"):
        lower.check(1)
    lower.stop()
    middle.stop()


class CrowdedStore(dist.HashStore):
    """A store whose notices of failures go up between the look of another process and its own notice."""

    def clone(self):
        return self

    def check(self, keys):
        return keys != ["failed"] and super().check(keys)


def test_neighbours_of_a_lost_machine_that_miss_different_processes_name_the_same(monkeypatch):
    monkeypatch.setattr(peers, "_LAST_WORDS", 0.1)
    store, names = CrowdedStore(), [f"Block {block} (rank {block})" for block in range(4)]
    below, above = (peers.Peers(store, rank=rank, names=names, timeout=4.0) for rank in (0, 3))
    with pytest.raises(BlockPeerError, match=r"^Block 2 \(rank 2\) is gone; .*\(broken pipe\)\. Block 3"):
        above.check(2, OSError("broken pipe"))
    with pytest.raises(BlockPeerError, match=r"^Block 2 \(rank 2\) is gone; .*\(broken pipe\)\. Block 0"):
        below.check(1, OSError("connection reset"))
    below.report(KeyError("too late to be the cause"))
    with pytest.raises(BlockPeerError, match=r"^Block 2 \(rank 2\) is gone"):
        above.check(2, OSError("broken pipe"))
    below.stop()
    above.stop()


def test_nobody_stops_before_all_have_heard_that_they_are_to():
    store = dist.HashStore()
    first, second = (peers.Peers(store, rank=rank, names=["Block 0", "Block 1"], timeout=4.0) for rank in (0, 1))
    second.stop()  # its ears are closed
    first.tell_to_stop()
    assert first.told_to_stop
    assert first.stop_at(5, decides=True) is None
    second.tell_to_stop()
    assert second.stop_at(4, decides=False) is None
    assert first.stop_at(6, decides=True) == 6
    assert second.stop_at(4, decides=False) == 6
    first.stop()
