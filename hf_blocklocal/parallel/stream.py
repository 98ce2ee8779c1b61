"""Boundary tensors on their way from one block to the next, while both compute.

Messages go one way and keep their order, so there is nothing to wait for in a circle. A thread sends what is waiting
in a short queue, another one receives ahead of time into a second; the process that computes only ever waits for a
message that has not come yet, or for a queue that is full. On a GPU the threads have streams of their own. In that of
the computation what is sent would stand behind all work that the host has handed in since, and what is received ahead
of time would hold up the work before it: blocks would take turns.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_blocklocal.crossing import claim, into_main_memory, queue_apart, ready, settle, working_in
from hf_blocklocal.errors import OutOfStepError
from hf_blocklocal.parallel.wire import TensorForm, decoded, encoded, put_together, take_apart


HEADER_BYTES = 8192
# Messages that may wait on either side. Two hide a transfer; more evens out blocks whose pace varies.
DEPTH = 4
_POLL = 0.1
# Times of waiting that are remembered, enough for the last few steps.
_REMEMBERED = 256
_OUT_OF_STEP = (
    "This process {} rank {}, which {}. Processes of a chain must train, evaluate and stop together: let callbacks, "
    "and whatever the script makes depend on the rank or on a clock, come out the same in all of them."
)


@dataclass(frozen=True)
class Link:
    """The way to a neighbour.

    Attributes:
        peer: Its rank.
        headers: Process group of the two, for tensors on the CPU.
        payload: Process group of the two, for tensors on `device`.
        device: Where tensors are received.
    """

    peer: int
    headers: dist.ProcessGroup
    payload: dist.ProcessGroup
    device: torch.device

    @property
    def staging(self) -> torch.device:
        """Where tensors must be while they travel: gloo carries those on the CPU alone."""
        return torch.device("cpu") if dist.get_backend(self.payload) == "gloo" else self.device

    @property
    def is_staged(self) -> bool:
        """Whether tensors of a GPU travel by way of the main memory."""
        return self.device.type == "cuda" and self.staging.type == "cpu"

    def greet(self) -> None:
        """Send a first number: NCCL connects two GPUs when they first need it, which must not be while they compute.

        Connecting waits for all that a GPU is at. If that were a message to come, of a process that is about to
        connect itself, both would wait for ever.
        """
        dist.send(torch.zeros(1, device=self.staging), self.peer, group=self.payload)

    def be_greeted(self) -> None:
        """Receive what the other side sends in `greet`."""
        dist.recv(torch.empty(1, device=self.staging), self.peer, group=self.payload)


@dataclass(frozen=True)
class Message:
    """What one block has handed on.

    Attributes:
        facts: What it says of itself, such as its step and the checksum of its batch.
        value: The values, tensors among them.
    """

    facts: Mapping[str, Any]
    value: Any


@dataclass(frozen=True)
class _Outgoing:
    """What waits to be sent: its header, its tensors, and when a GPU has computed them."""

    header: Tensor
    tensors: list[Tensor]
    ready: torch.cuda.Event | None = None


class _Worker:
    """A thread at one end of a link, and the queue between it and the process.

    It runs from `open` to `close`, which both ends call: a process that ended, or left its process groups, while a
    thread of its was still listening, would be cut off in the middle of it.
    """

    def __init__(self, link: Link, watch: Callable[[BaseException | None], None], depth: int = DEPTH) -> None:
        self.link = link
        self._watch = watch
        self.waited = 0.0
        self.waits: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._apart = queue_apart(link.device)
        self.error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Start to work."""
        self._thread = threading.Thread(target=self._work, name=f"{type(self).__name__} {self.link.peer}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        raise NotImplementedError

    def _work(self) -> None:
        try:
            with working_in(self._apart):
                self._run()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the process that computes must hear of it
            self.error = error

    def _check_open(self) -> None:
        if self._thread is None:
            raise RuntimeError(f"The stream of rank {self.link.peer} is closed: open a session of the chain first.")

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        start, clock = time.perf_counter(), time.time()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - start
            self.waits.append((clock, time.time()))

    def _join(self) -> None:
        while self._thread.is_alive():
            self._thread.join(_POLL)
            self._watch(self.error)
        self._thread = None


class Outbox(_Worker):
    """Sends messages to the block above.

    Args:
        link: The way there.
        watch: Called now and then while there is nothing to do but wait, with an error of the thread if it has one;
            raises where waiting is in vain.
        depth: Messages that may wait on this side.
    """

    def send(self, facts: Mapping[str, Any], value: Any) -> None:
        """Send a message, and return at once unless as many others are waiting as may.

        The tensors in it must not be changed afterwards.
        """
        description, tensors = take_apart(value)
        forms = [TensorForm.of(tensor) for tensor in tensors]
        header = {"facts": dict(facts), "value": description, "forms": [[form.dtype, form.shape] for form in forms]}
        self._put(_Outgoing(encoded(header, HEADER_BYTES), tensors, ready(self.link.device)))

    def close(self) -> None:
        """Tell the other side that nothing more will come for now, and wait until everything has been taken."""
        self._put(_Outgoing(encoded({}, HEADER_BYTES), []))
        self._join()

    def _put(self, item: _Outgoing) -> None:
        self._check_open()
        with self._waiting():
            while True:
                if self.error is not None:
                    self._watch(self.error)
                try:
                    return self._queue.put(item, timeout=_POLL)
                except queue.Full:
                    self._watch(None)

    def _run(self) -> None:
        while self._deliver(self._queue.get()):
            pass

    def _deliver(self, message: _Outgoing) -> bool:
        """Send a message and keep it until it has left; tell whether others follow.

        Nothing is said of it before it is there: what NCCL has begun to receive keeps a part of the GPU busy.
        """
        if message.ready is not None:
            message.ready.synchronize()
        dist.send(message.header, self.link.peer, group=self.link.headers)
        for tensor in message.tensors:
            self._transmit(self._staged(tensor.contiguous()))
        settle(self.link.device)
        return bool(decoded(message.header))

    def _staged(self, tensor: Tensor) -> Tensor:
        staging = self.link.staging
        return into_main_memory(tensor) if staging.type == "cpu" else tensor.to(staging)

    def _transmit(self, tensor: Tensor) -> None:
        """Send one tensor, in the thread."""
        dist.send(tensor, self.link.peer, group=self.link.payload)


class Inbox(_Worker):
    """Receives messages from the block below.

    Args:
        link: The way they come.
        watch: As of an `Outbox`.
        depth: As of an `Outbox`.
    """

    def __init__(self, link: Link, watch: Callable[[BaseException | None], None], depth: int = DEPTH) -> None:
        super().__init__(link, watch, depth)
        self._closing = threading.Event()
        self._missed = False

    def take(self) -> Message:
        """Return the next message, waiting for it if need be."""
        self._check_open()
        with self._waiting():
            while True:
                try:
                    message, tensors = self._queue.get(timeout=_POLL)
                    claim(tensors)
                    return message
                except queue.Empty:
                    self._watch(self.error)
                    if not self._thread.is_alive() and self._queue.empty():
                        raise OutOfStepError(_OUT_OF_STEP.format("waits for", self.link.peer, "has ended")) from None

    def _run(self) -> None:
        header = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        while True:
            dist.recv(header, self.link.peer, group=self.link.headers)
            said = decoded(header)
            if not said:
                return
            self._keep(*self._received(said))

    def _received(self, said: Mapping[str, Any]) -> tuple[Message, list[Tensor]]:
        """Return a message and the tensors in it once all of it has come, so that no GPU ever waits for one."""
        tensors = []
        for dtype, shape in said["forms"]:
            tensor = TensorForm(dtype, tuple(shape)).empty(self.link.staging, pinned=self.link.is_staged)
            dist.recv(tensor, self.link.peer, group=self.link.payload)
            tensors.append(tensor.to(self.link.device, non_blocking=True))
        settle(self.link.device)
        return Message(said["facts"], put_together(said["value"], tensors)), tensors

    def _keep(self, message: Message, tensors: list[Tensor]) -> None:
        while not self._closing.is_set():
            with suppress(queue.Full):
                self._queue.put((message, tensors), timeout=_POLL)
                return
        self._missed = True

    def close(self) -> None:
        """Wait until the other side says that nothing more will come for now.

        Raises:
            OutOfStepError: If something has come that nobody has taken.
        """
        self._closing.set()
        self._join()
        self._closing.clear()
        if self._missed or not self._queue.empty():
            raise OutOfStepError(_OUT_OF_STEP.format("has ended, and", self.link.peer, "goes on"))
