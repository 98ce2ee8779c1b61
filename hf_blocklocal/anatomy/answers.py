"""Remember what a model asks of its inputs, because it asks the same again when it runs on them again.

Models look at their masks: where nothing is padded, they leave them out. On an accelerator each such look makes the
host wait until the device has done all that it was told before. A head that borrows layers runs the model once more
on the same batch, so it is told what the model was told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


ASK = (Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item, Tensor.tolist)
MAKE = (torch.arange, torch.ones, torch.zeros, torch.full)
# Larger tensors, such as masks of all pairs of positions, are nothing that a model asks about.
LARGEST = 1 << 18
# What models make of masks and numbers. Of the results of all other functions nothing is remembered.
_CASTS = ("to", "bool", "int", "long", "type_as", "clone", "contiguous", "ones_like", "zeros_like", "full_like")
_SHAPES = ("view", "reshape", "flatten", "expand", "expand_as", "repeat", "unsqueeze", "squeeze", "transpose", "flip")
_PARTS = ("select", "narrow", "permute", "cat", "stack", "where", "masked_fill", "new_ones", "new_zeros", "new_full")
_SUMS = ("all", "any", "sum", "cumsum", "diff", "amax", "amin", "max", "min", "argmax", "argmin", "clamp")
_SIGNS = ("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "logical_and", "logical_or", "logical_not")
_DUNDER = ("getitem", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "invert", "add", "radd", "sub", "rsub", "mul")
_PURE = (*_CASTS, *_SHAPES, *_PARTS, *_SUMS, *_SIGNS, *(f"__{name}__" for name in _DUNDER))
_KNOWN_FUNCTIONS = frozenset(
    [*ASK, *MAKE, *(getattr(home, name) for home in (torch, Tensor) for name in _PURE if hasattr(home, name))]
)
_PLAIN = (bool, int, str, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format)


class Answers:
    """What a model has asked of one batch before its layers began, and was told.

    Args:
        inputs: The batch, with the very tensors that the model is given.
        layers: The layers of the model, in the order of execution. They look at no inputs, and are left alone.
        stacks: For each layer, which stack it belongs to: before the first layer of each, models ask.
    """

    def __init__(self, inputs: Mapping[str, Any], layers: Sequence[nn.Module], stacks: Sequence[int]) -> None:
        self._memory = _Memory({name: value for name, value in inputs.items() if _can_be_known(value)})
        self._is_on = False
        self._inside: int | None = None
        self._layers = layers
        self._firsts = [index for index in range(len(stacks)) if stacks.index(stacks[index]) == index]
        self._stacks = stacks

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Listen while the model runs inside the `with`, for the first time or, inside of that, again."""
        with ExitStack() as stack:
            for first in self._firsts:
                enter = self._layers[first].register_forward_pre_hook(self._entering(self._stacks[first]))
                stack.callback(enter.remove)
            for first in self._firsts[1:]:
                leave = self._layers[first - 1].register_forward_hook(self._leaving(self._stacks[first - 1]))
                stack.callback(leave.remove)
            with self.running():
                yield

    @contextmanager
    def running(self) -> Iterator[None]:
        """Begin a run on the batch with the `with`."""
        around, self._inside = self._inside, None
        self._memory.begin()
        self._listen()
        try:
            yield
        finally:
            self._stop_listening()
            self._inside = around

    def _listen(self) -> None:
        if not self._is_on:
            self._memory.__enter__()
            self._is_on = True
        self._memory.is_muted = False

    def _stop_listening(self) -> None:
        self._memory.is_muted = True
        # Else a mode of somebody else's lies on top, which is not ours to take off.
        if self._is_on and torch.overrides._get_current_function_mode() is self._memory:
            self._memory.__exit__(None, None, None)
            self._is_on = False

    def _entering(self, stack: int) -> Callable[..., None]:
        def hook(_layer: nn.Module, _args: tuple[Any, ...]) -> None:
            self._inside = stack
            self._stop_listening()
            if stack == self._stacks[-1]:  # nothing is asked behind the last layers
                self._memory.forget()

        return hook

    def _leaving(self, stack: int) -> Callable[..., None]:
        def hook(_layer: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
            if self._inside == stack:  # else a checkpointed layer is being recomputed
                self._inside = None
                self._listen()

        return hook


class _Memory(TorchFunctionMode):
    """Tells tensors by how they were made of a batch, and remembers what was read from them.

    Attributes:
        is_muted: Whether it only lets functions run.

    Args:
        inputs: The batch.
    """

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.is_muted = False
        self._inputs = inputs
        self._versions = [tensor._version for tensor in inputs.values()]
        self._numbers: dict[Any, int] = {}
        self._told: dict[Any, Any] = {}
        # Each tensor is kept with its number, so that no other one can get its id, and with its version, which every
        # change in place counts up, whoever makes it and through whichever view.
        self._known: dict[int, tuple[Tensor, int, int]] = {}

    def begin(self) -> None:
        """Start anew from the batch. What was told before holds, unless the batch has changed."""
        self.forget()
        if [tensor._version for tensor in self._inputs.values()] == self._versions:
            for name, tensor in self._inputs.items():
                self._know(tensor, name)

    def forget(self) -> None:
        """Let go of all tensors."""
        self._known.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function of torch, or answer from memory where its result is no tensor."""
        kwargs = kwargs or {}
        made = None if self.is_muted else self._made_by(func, args, kwargs)
        if made is None:
            return func(*args, **kwargs)
        if func in ASK:
            if made not in self._told:
                self._told[made] = func(*args, **kwargs)
            return deepcopy(self._told[made])
        result = func(*args, **kwargs)
        # What is there already, such as a batch that is sent to where it is, keeps its number.
        if id(result) not in self._known and _can_be_known(result, floats=func in MAKE):
            self._know(result, made)
        return result

    def _know(self, tensor: Tensor, made: Any) -> None:
        self._known[id(tensor)] = tensor, self._numbers.setdefault(made, len(self._numbers)), tensor._version

    def _made_by(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what is the same where a function makes the same of the same; None if that cannot be told."""
        if func not in _KNOWN_FUNCTIONS or kwargs.get("out") is not None:
            return None
        if func not in MAKE and not (args and isinstance(args[0], Tensor | list | tuple)):
            return None
        try:
            return func, self._number_of(args), self._number_of(sorted(kwargs.items())), torch.get_default_dtype()
        except _UnknownError:
            return None

    def _number_of(self, value: Any) -> Any:
        """Return something to compare arguments by: tensors by their number, everything else by type and value."""
        if isinstance(value, Tensor):
            tensor, number, version = self._known.get(id(value), (None, 0, 0))
            if tensor is not value or value._version != version:
                raise _UnknownError
            return Tensor, number
        if isinstance(value, slice):
            return slice, *map(self._number_of, (value.start, value.stop, value.step))
        if isinstance(value, list | tuple):
            return type(value), *map(self._number_of, value)
        if isinstance(value, float):
            return float, repr(value)
        if not isinstance(value, _PLAIN):
            raise _UnknownError
        return type(value), value


class _UnknownError(Exception):
    """An argument cannot be compared with another one."""


def _can_be_known(value: Any, *, floats: bool = False) -> bool:
    """Tell whether a value is an ordinary small tensor, of whole numbers if nothing else is said."""
    if type(value) is not Tensor or value.layout != torch.strided or value.is_inference():
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return False
    return value.numel() <= LARGEST and (floats or is_small(value))


def is_waited_for(inputs: Mapping[str, Any]) -> bool:
    """Tell whether to read from a batch is to wait for a device."""
    return any(isinstance(value, Tensor) and value.device.type != "cpu" for value in inputs.values())


def compiles_outside(model: nn.Module, layers: Iterable[nn.Module]) -> bool:
    """Tell whether a model runs compiled code outside its layers, which cannot be listened to.

    Masks of flex attention are such code, and embeddings that a user has compiled.
    """
    if "flex" in str(getattr(getattr(model, "config", None), "_attn_implementation", None)):
        return True
    inside = {module for layer in layers for module in layer.modules()}
    return any(
        module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
        if module not in inside
    )


def is_small(tensor: Tensor) -> bool:
    """Tell whether models may ask about a tensor: few whole numbers."""
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel() <= LARGEST
