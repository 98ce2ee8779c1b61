"""Messages arrive in order, and a process that ends where its neighbour goes on is told so instead of left waiting."""

from __future__ import annotations

import queue
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from hf_blocklocal.errors import OutOfStepError
from hf_blocklocal.parallel import stream
from hf_blocklocal.parallel.chain import Chain
from hf_blocklocal.parallel.stream import Inbox, Link, Outbox
from hf_blocklocal.trainer.placing import PlacesBlocks


@pytest.fixture
def ends(monkeypatch):
    """The two ends of an open stream that leads through memory."""
    under_way = queue.Queue()
    monkeypatch.setattr(stream.dist, "send", lambda tensor, *_, **__: under_way.put(tensor.clone()))
    monkeypatch.setattr(stream.dist, "recv", lambda tensor, *_, **__: tensor.copy_(under_way.get()))
    monkeypatch.setattr(stream.dist, "get_backend", lambda _group: "gloo")
    link = Link(peer=1, headers=None, payload=None, device=torch.device("cpu"))
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
