"""Bring tensors from one device to another without making the host, or a device that is ahead, wait.

What CUDA does decides the form. A copy from pageable memory makes the host wait for the device, one from pinned memory
does not. A copy between two devices makes the queue of each wait for the other's: that is no loss between a device and
the next, and a standstill from the first to the last. Weights that come down from a later device therefore wait in a
queue of their own. On other accelerators, and on the CPU, tensors are copied as torch does it.
"""

from __future__ import annotations

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
