"""Messages arrive in order, and a process that ends where its neighbour goes on is told so instead of left waiting."""

from __future__ import annotations

import queue
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from hf_blocklocal.borrowing.copies import Copies
from hf_blocklocal.errors import OutOfStepError
from hf_blocklocal.parallel import stream
from hf_blocklocal.parallel.chain import Chain
from hf_blocklocal.parallel.stream import Inbox, Link, Outbox
from hf_blocklocal.trainer.placing import PlacesBlocks


@pytest.fixture
def link(monkeypatch):
    monkeypatch.setattr(stream.dist, "get_backend", lambda _group: "gloo")
    return Link(peer=1, headers=None, payload=None, device=torch.device("cpu"))


@pytest.fixture
def ends(link, monkeypatch):
    """The two ends of an open stream that leads through memory."""
    under_way = queue.Queue()
    monkeypatch.setattr(stream.dist, "send", lambda tensor, *_, **__: under_way.put(tensor.clone()))
    monkeypatch.setattr(stream.dist, "recv", lambda tensor, *_, **__: tensor.copy_(under_way.get()))
    outbox, inbox = Outbox(link, lambda _error: None), Inbox(link, lambda _error: None)
    outbox.open()
    inbox.open()
    return outbox, inbox


def test_messages_arrive_in_order(ends):
    outbox, inbox = ends
    for step in range(9):
        outbox.send({"step": step}, [torch.full((2, step), step), None])
        message = inbox.take()
        assert message.facts == {"step": step}
        assert torch.equal(message.value[0], torch.full((2, step), step))
    outbox.close()
    inbox.close()


@pytest.mark.parametrize(("every", "lag"), [(1, 16), (10, 2), (4, 12), (0, 0)])
def test_weights_that_come_into_use_late_can_all_be_under_way(every, lag, monkeypatch):
    copies = Copies(torch.nn.Linear(1, 1), [{"weight"}], every=every, lag=lag)
    given, most = 0, 0
    monkeypatch.setattr(copies, "_set_out", lambda used_at, now: copies._waiting.setdefault(used_at, {}))
    monkeypatch.setattr(copies, "_arrive", lambda step, decay: copies._waiting.pop(step, None))
    for step in range(40):
        used_at = step + lag
        given += every > 0 and used_at % every == 0
        copies.advance_(step)
        most = max(most, len(copies._waiting) + 1)  # the one that arrives has been under way until then
    assert most <= copies.most_under_way < 40
    assert given == 0 or most > lag // every


def test_no_one_waits_to_send_what_nobody_has_taken_yet(link, monkeypatch):
    taken = threading.Event()
    monkeypatch.setattr(stream.dist, "send", lambda *_, **__: taken.wait())
    waits = []
    outbox = Outbox(link, waits.append, depth=17)
    outbox.open()
    for step in range(17):
        outbox.send({"step": step}, None)
    assert waits == []
    taken.set()
    outbox.close()


def test_who_waits_for_a_neighbour_that_has_ended_is_told_so(ends):
    outbox, inbox = ends
    outbox.send({"step": 0}, None)
    outbox.close()
    assert inbox.take().facts == {"step": 0}
    with pytest.raises(OutOfStepError, match="waits for rank 1, which has ended"):
        inbox.take()


@pytest.mark.parametrize("messages", [1, 9])
def test_who_ends_before_its_neighbour_is_told_so(ends, messages):
    outbox, inbox = ends
    outbox.send({"step": 0}, None)
    inbox.take()
    for step in range(messages):
        outbox.send({"step": step}, None)
    outbox.close()
    with pytest.raises(OutOfStepError, match="has ended, and rank 1, which goes on"):
        inbox.close()


def test_weights_on_their_way_may_stay_there_until_the_outermost_session_ends():
    fetched = []
    groups = ("replicas", "blocks", "control", "control_of_blocks", "control_of_replicas")
    places = dict.fromkeys((*groups, "peers", "device"))
    trainer = object.__new__(PlacesBlocks)
    trainer._leaving = nullcontext()
    trainer._chain = Chain(block=0, num_blocks=2, replica=0, num_replicas=1, **places)
    trainer.assembly = SimpleNamespace(copies=SimpleNamespace(fetch=lambda: fetched.append("all")))
    with trainer._session():
        for _step in range(2):
            with trainer._session():
                pass
        assert fetched == []
    assert fetched == ["all"]
