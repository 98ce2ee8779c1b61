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
_DRAWS = ("rand", "bernoulli", "multinomial", "normal")
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_IN_PLACE = ("__setitem__", *(f"__i{name}__" for name in _OPERATORS))
_PLAIN = (bool, int, float, str, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format)


class Answers:
    """What a model has asked of one batch before its layers began, and was told.

    Args:
        inputs: The batch, with the very tensors that the model is given.
        layers: The layers of the model, in the order of execution. They look at no inputs, and are left alone.
        stacks: For each layer, which stack it belongs to: before the first layer of each, models ask.
    """

    def __init__(self, inputs: Mapping[str, Any], layers: Sequence[nn.Module], stacks: Sequence[int]) -> None:
        self._inputs = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and is_small(value)}
        self._memory = _Memory()
        self._listening = ExitStack()
        self._inside: int | None = None
        self._layers = layers
        self._firsts = [index for index in range(len(stacks)) if stacks.index(stacks[index]) == index]
        self._stacks = stacks

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Listen while the model runs inside the `with`, for the first time or, inside of that, again."""
        with ExitStack() as stack:
            stack.callback(self._listening.close)
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
        self._memory.begin(self._inputs)
        self._listen()
        try:
            yield
        finally:
            self._listening.close()
            self._inside = around

    def _listen(self) -> None:
        self._listening.close()
        self._listening.enter_context(self._memory)

    def _entering(self, stack: int) -> Callable[..., None]:
        def hook(_layer: nn.Module, _args: tuple[Any, ...]) -> None:
            self._inside = stack
            self._listening.close()

        return hook

    def _leaving(self, stack: int) -> Callable[..., None]:
        def hook(_layer: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
            if self._inside == stack:  # else a checkpointed layer is being recomputed
                self._inside = None
                self._listen()

        return hook


class _Memory(TorchFunctionMode):
    """Tells tensors by how they were made of a batch, and remembers what was read from them."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[Any, int] = {}
        self._told: dict[Any, Any] = {}
        # Each tensor is kept with its number, so that no other one can get its id.
        self._known: dict[int, tuple[Tensor, int]] = {}
        self._of_batch: set[int] = set()
        self._is_lost = False

    def begin(self, inputs: Mapping[str, Tensor]) -> None:
        """Start anew from the batch; what was told before holds."""
        self._known.clear()
        for name, tensor in inputs.items() if not self._is_lost else ():
            self._of_batch.add(self._know(tensor, name))

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function of torch, or answer from memory where its result is no tensor."""
        kwargs = kwargs or {}
        if changes(func, kwargs):
            self._forget(tensors_in((*args[:1], kwargs.get("out"))))
            return func(*args, **kwargs)
        made = self._made_by(func, args, kwargs)
        if made is None:
            return func(*args, **kwargs)
        if func in ASK:
            if made not in self._told:
                self._told[made] = func(*args, **kwargs)
            return deepcopy(self._told[made])
        result = func(*args, **kwargs)
        # What is there already, such as a batch that is sent to where it is, keeps its number.
        if isinstance(result, Tensor) and id(result) not in self._known and (is_small(result) or func in MAKE):
            self._know(result, made)
        return result

    def _made_by(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what is the same where a function makes the same of the same; None if that cannot be told."""
        tensors = tensors_in((*args, *kwargs.values()))
        if not (tensors or func in MAKE) or draws(func) or "empty" in getattr(func, "__name__", ""):
            return None
        if not all(id(tensor) in self._known for tensor in tensors):
            return None
        try:
            return func, self._number_of(args), self._number_of(sorted(kwargs.items()))
        except _UnknownError:
            return None

    def _forget(self, changed: Sequence[Tensor]) -> None:
        """Forget all that shares memory with what is being changed; if that is the batch, for good."""
        places = {tensor.untyped_storage().data_ptr() for tensor in changed}
        for key, (tensor, number) in list(self._known.items()):
            if tensor.untyped_storage().data_ptr() in places:
                del self._known[key]
                self._is_lost = self._is_lost or number in self._of_batch

    def _know(self, tensor: Tensor, made: Any) -> int:
        number = self._numbers.setdefault(made, len(self._numbers))
        self._known[id(tensor)] = tensor, number
        return number

    def _number_of(self, value: Any) -> Any:
        """Return something to compare arguments by: tensors by their number, everything else by type and value."""
        if isinstance(value, Tensor):
            return Tensor, self._known[id(value)][1]
        if isinstance(value, slice):
            return slice, *map(self._number_of, (value.start, value.stop, value.step))
        if isinstance(value, list | tuple):
            return tuple, *map(self._number_of, value)
        if not isinstance(value, _PLAIN):
            raise _UnknownError
        return type(value), value


class _UnknownError(Exception):
    """An argument cannot be compared with another one."""


def is_waited_for(inputs: Mapping[str, Any]) -> bool:
    """Tell whether to read from a batch is to wait for a device."""
    return any(isinstance(value, Tensor) and value.device.type != "cpu" for value in inputs.values())


def is_small(tensor: Tensor) -> bool:
    """Tell whether models may ask about a tensor: few whole numbers."""
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel() <= LARGEST


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among arguments, and in their lists."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found


def changes(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a function changes a tensor that it is given."""
    name = getattr(func, "__name__", "")
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return in_place or kwargs.get("out") is not None


def draws(func: Callable[..., Any]) -> bool:
    """Tell whether the result of a function is not its arguments' alone."""
    return any(name in getattr(func, "__name__", "") for name in _DRAWS)
