"""Measure the memory of a training step: what autograd saves for backward, and everything that is alive.

Bytes of storages are counted, on any device. Nothing here knows blocks, heads or trainers.
"""

from __future__ import annotations

import importlib
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Ledger:
    """Adds up the bytes of storages; one that is held several times counts once."""

    def __init__(self) -> None:
        self.live_bytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}
        self._holds: dict[int, int] = {}

    def hold(self, key: int, size: int) -> None:
        if key not in self._holds:
            self._holds[key], self._sizes[key] = 0, size
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self._holds[key] += 1

    def release(self, key: int) -> None:
        self._holds[key] -= 1
        if self._holds[key] == 0:
            self.live_bytes -= self._sizes.pop(key)
            del self._holds[key]

    def __contains__(self, key: int) -> bool:
        return key in self._holds


class _Saved:
    """A tensor that autograd has saved. When autograd lets go of it, its bytes are given back."""

    __slots__ = ("_key", "_ledger", "tensor")

    def __init__(self, tensor: Tensor, ledger: _Ledger) -> None:
        # Without its history: an operation that saves its own result would keep itself alive.
        self.tensor = tensor.detach()
        self._ledger = ledger
        self._key = _storage_key(tensor)
        ledger.hold(self._key, tensor.untyped_storage().nbytes())

    def __del__(self) -> None:
        self._ledger.release(self._key)


class _Meter:
    """Reads a ledger."""

    _ledger: _Ledger

    @property
    def peak_bytes(self) -> int:
        """The most bytes counted at any one time so far."""
        return self._ledger.peak_bytes

    @property
    def live_bytes(self) -> int:
        """Bytes counted now."""
        return self._ledger.live_bytes


class ActivationMeter(_Meter):
    """Measures the most bytes that autograd keeps saved for backward passes at any one time.

    Counts what the operations inside the `with` save, from the moment they save it to the moment a backward pass
    frees it, so a backward pass inside the forward pass shows. A storage counts once, and whole, however many saved
    tensors are views of it. Changes no result.

    Not seen are gradients and temporaries, and what `torch.utils.checkpoint` saves inside a checkpoint, which has
    hooks of its own; `TensorMeter` sees both. The copies of weights that autocast makes count as activations.

    Args:
        module: Module whose parameters and buffers do not count, as they were when the `with` was entered.

    Example:
        >>> with ActivationMeter(model) as meter:
        ...     model(**batch).loss.backward()
        >>> meter.peak_bytes
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self._module = module
        self._ledger = _Ledger()
        self._own: set[int] = set()
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> ActivationMeter:
        if self._module is not None:
            self._own = {_storage_key(tensor) for tensor in (*self._module.parameters(), *self._module.buffers())}
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        return tensor if _storage_key(tensor) in self._own else _Saved(tensor, self._ledger)

    @staticmethod
    def _unpack(packed: Tensor | _Saved) -> Tensor:
        return packed.tensor if isinstance(packed, _Saved) else packed


class TensorMeter(_Meter, TorchDispatchMode):
    """Measures the most bytes of tensors that are alive at any one time, whoever keeps them.

    Counts every storage that an operation inside the `with` makes, until it is freed: activations, those of
    checkpointed layers included, gradients, temporaries, optimizer states. What was there before does not count, and
    neither does the working memory inside a kernel. A storage counts once and whole. Changes no result, but makes
    every operation slower by some 10 microseconds.

    Example:
        >>> with TensorMeter() as meter:
        ...     model(**batch).loss.backward()
        >>> meter.peak_bytes
    """

    def __init__(self) -> None:
        super().__init__()
        self._ledger = _Ledger()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count the storages that only its results have."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {_storage_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (key := _storage_key(leaf)) not in given and key not in self._ledger:
                storage = leaf.untyped_storage()
                self._ledger.hold(key, storage.nbytes())
                weakref.finalize(storage, self._ledger.release, key).atexit = False
        return result


def peaks_so_far(devices: Iterable[torch.device]) -> dict[str, tuple[int, str]]:
    """Return the most memory that has been in use so far, without having watched anything.

    Args:
        devices: The devices that the run computes on. The main memory is that of the whole process.

    Returns:
        By device, the bytes and what they count: `"allocated"` by torch, or `"resident"` for the process. A device
        that keeps no such count is left out.
    """
    peaks = {}
    for device in dict.fromkeys(devices):
        if device.type == "cuda":
            peaks[name_of(device)] = (torch.cuda.max_memory_allocated(device), "allocated")
        elif device.type == "cpu" and sys.platform != "win32":
            usage = importlib.import_module("resource")  # there is none on Windows
            unit = 1 if sys.platform == "darwin" else 1024
            peaks[name_of(device)] = (usage.getrusage(usage.RUSAGE_SELF).ru_maxrss * unit, "resident")
    return peaks


def name_of(device: torch.device) -> str:
    """Return the name of a device; there is one main memory, whatever number launchers give it."""
    return "cpu" if device.type == "cpu" else str(device)


def _storage_key(tensor: Tensor) -> int:
    """Return what identifies a tensor's storage as long as it lives."""
    return tensor.untyped_storage()._cdata
