"""Bring tensors from one device, or process, to another without making the host, or a device that is ahead, wait.

What CUDA does decides the form. A copy from pageable memory makes the host wait for the device, one from pinned memory
does not. A copy between two devices makes the queue of each wait for the other's: that is no loss between a device and
the next, and a standstill from the first to the last. Weights that come down from a later device therefore wait in a
queue of their own, and threads that send and receive have such queues too. On other accelerators, and on the CPU,
tensors are copied as torch does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; from the main memory, without waiting for what the device is at.

    Args:
        tensor: A tensor on any device.
        device: Where it is needed.
    """
    if tensor.device == device:
        return tensor
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()  # as it is, if the data loader has pinned it
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Underway:
    """A tensor that is on its way to a device, and must not be looked at before it is waited for.

    Attributes:
        tensor: The tensor, on that device.
        arrival: Its arrival in the device's second queue; None where it is there already.
    """

    tensor: Tensor
    arrival: torch.cuda.Event | None = None

    def arrived(self) -> Tensor:
        """Return the tensor for use on its device, which waits for it; the host does not."""
        if self.arrival is not None:
            queue = torch.cuda.current_stream(self.tensor.device)
            queue.wait_event(self.arrival)
            self.tensor.record_stream(queue)
        return self.tensor


_second_queues: dict[torch.device, torch.cuda.Stream] = {}


def set_out(tensor: Tensor, device: torch.device) -> Underway:
    """Send a copy of a tensor, as it is now, to a device that is to need it later.

    Args:
        tensor: A tensor on any device. It may be changed right after the call.
        device: Where it is going to be needed.
    """
    if device.type != "cuda":
        return Underway(tensor.to(device, non_blocking=True, copy=True))
    if tensor.device == device:
        return Underway(tensor.clone())
    if device not in _second_queues:
        _second_queues[device] = torch.cuda.Stream(device)
    queue = _second_queues[device]
    with torch.cuda.stream(queue):
        return Underway(tensor.to(device, non_blocking=True, copy=True), queue.record_event())


def queue_here(device: torch.device) -> torch.cuda.Stream | None:
    """Return the queue that this thread hands its work to; None elsewhere than on a GPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def queue_apart(device: torch.device) -> torch.cuda.Stream | None:
    """Return a queue beside that of the computation; None elsewhere than on a GPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def turn_to(device: torch.device) -> torch.device | None:
    """Let kernels that ask for the current GPU, as Triton's do, run on this one.

    Returns:
        The one that was current; None elsewhere than on a GPU.
    """
    if device.type != "cuda":
        return None
    before = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_device(device)
    return before


@contextmanager
def working_in(queue: torch.cuda.Stream | None) -> Iterator[None]:
    """Let this thread hand its work to a queue inside the `with`, if there is one."""
    if queue is None:
        yield
        return
    torch.cuda.set_device(queue.device)
    with torch.cuda.stream(queue):
        yield


def ready(device: torch.device) -> torch.cuda.Event | None:
    """Return what other threads can wait for until the GPU has done all that this one has handed in so far.

    Who waits leaves the processor to others. Elsewhere than on a GPU everything is done at once: None.
    """
    queue = queue_here(device)
    return None if queue is None else queue.record_event(torch.cuda.Event(blocking=True))


def settle(device: torch.device) -> None:
    """Wait until a GPU has done all that this thread has handed in; the host's other threads go on."""
    if (done := ready(device)) is not None:
        done.synchronize()


def into_main_memory(tensor: Tensor) -> Tensor:
    """Return a tensor in the main memory, waiting for no more of a GPU's work than is in this thread's queue."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    settle(tensor.device)
    return copy


def claim(tensors: Iterable[Tensor]) -> None:
    """Keep the memory of tensors, which another thread has made, until this thread's queue has done with them."""
    for tensor in tensors:
        if tensor.device.type == "cuda":
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
