"""A machine of several devices made of main memory: real values, and the rules of devices.

A storage is on a device. Whoever asks a tensor for its device is told that one, and operations on tensors of several
devices fail, as they do on accelerators. Copies between devices, and all that makes the host wait for a device, are
written down. What it computes is what the CPU computes, to the bit.
"""

from __future__ import annotations

import traceback
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


CPU = torch.device("cpu")
KIND = "hpu"  # a kind that torch knows by name, without kernels for lists of tensors
_WAITS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "is_nonzero", "bincount")


@dataclass(frozen=True)
class Copy:
    """A copy from one device to another."""

    source: torch.device
    target: torch.device
    shape: tuple[int, ...]


def device(number):
    return torch.device(KIND, number)


def place_of(tensor):
    return getattr(tensor.untyped_storage(), "place", CPU)


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, machine, target):
        ctx.machine, ctx.source = machine, place_of(tensor)
        with machine.making(target, crossing=True):
            return tensor.detach().clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.machine.gradients_crossed += 1
        ctx.machine.copied(gradient, ctx.source)
        with ctx.machine.making(ctx.source, crossing=True):
            return gradient.clone(), None, None


autocast, is_autocast_enabled = torch.autocast, torch.is_autocast_enabled
_group = torch._C._group_tensors_by_device_and_dtype


def _grouped(lists, with_indices=False):
    """Group lists of tensors as torch does, by the devices that they are on here."""
    groups = {}
    for (_, dtype), (parts, indices) in _group(lists, True).items():
        for number, first in enumerate(parts[0]):
            key = (place_of(first), dtype)
            lists_here, indices_here = groups.setdefault(key, ([[] for _ in parts], []))
            for mine, part in zip(lists_here, parts, strict=True):
                mine += part[number : number + 1]
            indices_here.append(indices[number])
    return groups


class _Rules(TorchDispatchMode):
    def __init__(self, machine):
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        machine, kwargs = self.machine, kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        places = {place_of(tensor) for tensor in tensors if not tensor.is_meta}
        name = func._schema.name.split("::")[1]
        place = machine.target if machine.crossing else self.place(name, args, tensors, places)
        if name.startswith(_WAITS) or (name.startswith("index") and _has_mask(args)):
            for where in places:
                machine.waited(where, name)
        out = func(*args, **kwargs)
        if not func._schema.is_mutable:
            known = {tensor.untyped_storage()._cdata for tensor in tensors if not tensor.is_meta}
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and not tensor.is_meta and tensor.untyped_storage()._cdata not in known:
                    tensor.untyped_storage().place = place
        return out

    def place(self, name, args, tensors, places):
        """Return where the result lies; an operation on several devices fails."""
        if name == "copy_":
            self.machine.copied(args[1], place_of(args[0]))
            return place_of(args[0])
        # As on accelerators: a number in main memory goes with tensors of any device, and nothing else does.
        bound = {place_of(tensor) for tensor in tensors if not tensor.is_meta and tensor.dim() > 0} | places - {CPU}
        if len(bound) > 1:
            told = [(str(place_of(tensor)), tuple(tensor.shape)) for tensor in tensors]
            raise RuntimeError(f"Expected all tensors to be on the same device, found {told} in {name}")
        if not tensors:
            return self.machine.target or CPU
        return next(iter(bound or {CPU}))


def _has_mask(args):
    return len(args) > 1 and any(
        isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1])
    )


class Machine(TorchFunctionMode):
    """Devices made of main memory, inside a `with`.

    Attributes:
        copies: Copies between devices, in order.
        waits: What made the host wait for which device: a device, an operation, and where in the code.
        gradients_crossed: How many gradients have gone from one device to another.
    """

    def __init__(self):
        super().__init__()
        self.copies, self.waits, self.gradients_crossed = [], [], 0
        self.target, self.crossing = None, False
        self.rules = _Rules(self)

    @contextmanager
    def running(self):
        with ExitStack() as stack:
            stack.enter_context(patch.object(torch._C, "_group_tensors_by_device_and_dtype", _grouped))
            # What torch has for a kind of device as a whole is that of the CPU.
            stack.enter_context(patch.object(torch, "autocast", lambda device_type, *a, **k: autocast("cpu", *a, **k)))
            stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda *_: is_autocast_enabled("cpu")))
            stack.enter_context(patch.object(torch.utils.checkpoint, "_infer_device_type", lambda *_: "cpu"))
            checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
            stack.enter_context(patch.dict(checks, default=lambda saved: {"shape": saved.shape, "dtype": saved.dtype}))
            stack.enter_context(self)
            stack.enter_context(self.rules)
            yield self

    def forget(self):
        self.copies.clear()
        self.waits.clear()

    @contextmanager
    def making(self, target, *, crossing=False):
        before = self.target, self.crossing
        self.target, self.crossing = target, crossing
        try:
            yield
        finally:
            self.target, self.crossing = before

    def waited(self, where, what):
        if where != CPU:
            frames = [f for f in traceback.extract_stack() if "several_devices" not in f.filename]
            code = [f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in frames if "/torch/" not in f.filename]
            self.waits.append((where, what, " < ".join(reversed(code[-4:]))))

    def copied(self, tensor, target):
        source = place_of(tensor)
        if source != target:
            self.copies.append(Copy(source, target, tuple(tensor.shape)))

    def moved(self, tensor, target, *, dtype=None, non_blocking=False, copy=False):
        source = place_of(tensor)
        if target is not None and target != source:
            self.copied(tensor, target)
            if CPU in (source, target) and not (non_blocking and source == CPU) and tensor.numel() > 0:
                self.waited(source if target == CPU else target, "copy")
            tensor = _Cross.apply(tensor, self, target)
        elif copy:
            tensor = tensor.clone()
        return tensor if dtype is None else tensor.to(dtype)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return place_of(args[0]) if not args[0].is_meta else torch.device("meta")
        if func in (Tensor.to, Tensor.cpu) and not args[0].is_meta:
            return self.to(func, args, kwargs)
        if func is Tensor.backward:
            return self.backward(*args, **kwargs)
        if func in (Tensor.tolist, Tensor.numpy):
            self.waited(place_of(args[0]), func.__name__)
        if func is Tensor.type and not args[1:]:
            return func(*args)
        wanted = kwargs.get("device")
        if isinstance(wanted, str):
            wanted = torch.device(wanted)
        if isinstance(wanted, torch.device) and wanted.type in (KIND, "cpu"):
            kwargs["device"] = CPU
            with self.making(wanted, crossing=True):
                made = func(*args, **kwargs)
            if isinstance(made, Tensor):
                made.untyped_storage().place = wanted
            return made
        return func(*args, **kwargs)

    def backward(self, tensor, gradient=None, retain_graph=None, create_graph=False, inputs=None):
        """Run a backward pass with the machine on: checkpointed layers are run again in there."""
        gradient = torch.ones_like(tensor) if gradient is None else gradient
        engine = torch.autograd.Variable._execution_engine
        with self:
            engine.run_backward(
                (tensor,), (gradient,), bool(retain_graph), create_graph, (), True, accumulate_grad=True
            )

    def to(self, func, args, kwargs):
        if func is Tensor.cpu:
            return self.moved(args[0], CPU)
        copy, other = kwargs.pop("copy", False), args[1] if len(args) > 1 else kwargs.get("other")
        if isinstance(other, Tensor):
            return self.moved(args[0], place_of(other), dtype=other.dtype, copy=copy)
        format_ = kwargs.pop("memory_format", None)
        target, dtype, non_blocking, _ = torch._C._nn._parse_to(*args[1:], **kwargs)
        if target is not None and target.type == "meta":
            return func(args[0], "meta") if dtype is None else func(args[0], "meta", dtype)
        moved = self.moved(args[0], target, non_blocking=non_blocking, copy=copy)
        options = {} if format_ is None else {"memory_format": format_}
        return (
            moved if dtype is None and not options else func(moved, moved.dtype if dtype is None else dtype, **options)
        )
