"""What only a GPU can show of streams between processes: neither end stands in the way of what the GPU computes."""

from __future__ import annotations

import queue

import pytest
import torch

from hf_blocklocal.parallel import stream
from hf_blocklocal.parallel.meetings import Meetings
from hf_blocklocal.parallel.stream import Inbox, Link, Outbox


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# More than a message takes, and less than a test may: about two seconds of a GPU.
LONG = 4_000_000_000


@pytest.fixture(params=["gloo", "nccl"])
def under_way(request, monkeypatch):
    """What one end sends and the other receives, where the backend would want it."""
    under_way = queue.Queue()

    def send(tensor, *_args, **_kwargs):
        assert tensor.dtype == torch.uint8 or tensor.is_cuda == (request.param == "nccl")
        copy = tensor.clone()
        torch.cuda.current_stream().synchronize()
        under_way.put(copy)

    def receive(tensor, *_args, **_kwargs):
        copy = under_way.get()
        tensor.copy_(copy)
        torch.cuda.current_stream().synchronize()  # the copy is another thread's memory

    monkeypatch.setattr(stream.dist, "send", send)
    monkeypatch.setattr(stream.dist, "recv", receive)
    monkeypatch.setattr(stream.dist, "get_backend", lambda _group: request.param)
    return under_way


def opened(kind):
    end = kind(Link(peer=1, headers=None, payload=None, device=torch.device("cuda", 0)), lambda _error: None)
    end.open()
    return end


def numbers(step):
    return torch.arange(1 << 20, device="cuda").float() + step


def test_what_is_sent_does_not_wait_for_what_is_computed_afterwards(under_way):
    outbox, inbox = opened(Outbox), opened(Inbox)
    outbox.send({"step": -1}, [numbers(-1)])  # memory and libraries
    inbox.take()
    for step in range(3):
        outbox.send({"step": step}, [numbers(step), None])
        torch.cuda._sleep(LONG // 3)
        last = torch.cuda.current_stream().record_event()
        message = inbox.take()
        assert not last.query()
        assert torch.equal(message.value[0], numbers(step))
    outbox.close()
    inbox.close()


def test_what_is_sent_is_what_the_gpu_has_computed_by_then(under_way):
    outbox, inbox = opened(Outbox), opened(Inbox)
    torch.cuda._sleep(LONG // 4)
    late = numbers(0) * 3
    outbox.send({"step": 0}, [late])
    del late  # its memory may be used again only after it has left
    torch.full((1 << 20,), -1.0, device="cuda")
    assert torch.equal(inbox.take().value[0], numbers(0) * 3)
    outbox.close()
    inbox.close()


def test_memory_of_what_has_come_is_kept_until_it_has_been_used(under_way):
    outbox, inbox = opened(Outbox), opened(Inbox)
    sums = []
    for step in range(6):
        outbox.send({"step": step}, [numbers(step)])
    for _step in range(6):
        value = inbox.take().value[0]
        torch.cuda._sleep(LONG // 40)
        sums.append(value.double().sum())
        del value
    expected = [numbers(step).double().sum().item() for step in range(6)]
    assert [total.item() for total in sums] == expected
    outbox.close()
    inbox.close()


def test_what_is_done_together_follows_what_its_caller_has_handed_in():
    meetings = Meetings(lambda: None, lambda _error: None, torch.device("cuda", 0))
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(LONG // 8)
        late = numbers(1)
        total = meetings.run(late.sum)
    assert total.item() == numbers(1).sum().item()
