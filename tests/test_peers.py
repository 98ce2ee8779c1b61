"""Processes say that they are alive until they are about to end, and not in the middle of that."""

from __future__ import annotations

import time

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
