"""Answer from the host what a model asks of its inputs, so that nobody waits for a device that computes them too.

Models look at their masks: where nothing is padded, they leave them out. On an accelerator each such look makes the
host wait. So small whole numbers made of a batch alone are computed twice, on their device and in main memory. Who
asks for a value gets it from there, and what is wanted on another device is sent from there, not between devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_blocklocal.anatomy.answers import ASK, MAKE, is_small
from hf_blocklocal.crossing import sent


_SEARCH = (Tensor.nonzero, torch.nonzero, torch.argwhere, Tensor.unique, torch.unique)
_DRAWS = ("rand", "bernoulli", "multinomial", "normal")
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_IN_PLACE = ("__setitem__", *(f"__i{name}__" for name in _OPERATORS))
_CPU = torch.device("cpu")


def pairs_of(placed: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Return tensors that have been sent to devices, each with the same values in main memory.

    Args:
        placed: A batch, with tensors on devices.
        inputs: The same batch as it was; what is in main memory counts. It is copied, because it may still be on its
            way, while a model changes it.
    """
    return [
        (placed[name], value.clone())
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.device == _CPU and placed[name] is not value and is_small(value)
    ]


class Shadows(TorchFunctionMode):
    """Keeps a batch in main memory beside the one on a device, for what runs inside the `with`.

    Args:
        pairs: Tensors on devices, each with the same values in main memory.
    """

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        # Each tensor is kept with its shadow, so that no other one can get its id.
        self._known = {id(tensor): (tensor, shadow) for tensor, shadow in pairs if is_small(tensor)}

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function of torch, and once more on shadows, if all of its tensors have one."""
        kwargs = kwargs or {}
        tensors = _tensors_in((*args, *kwargs.values()))
        is_known = all(id(tensor) in self._known for tensor in tensors) and (tensors or func in MAKE)
        if not is_known or _draws(func):
            return self._with_others(func, tensors, args, kwargs)
        if func in ASK:
            return func(self._known[id(args[0])][1], *args[1:], **kwargs)
        if func in _SEARCH or (func is torch.where and len(args) == 1):  # how much is found, only values can tell
            return self._found(func, args, kwargs)
        if func is Tensor.to and len(tensors) == 1 and (moved := self._sent(args, kwargs)) is not None:
            return moved
        if len({tensor.device for tensor in tensors if tensor.dim() > 0}) > 1:
            args, kwargs = self._brought(tensors[0].device, args, kwargs)
        result = func(*args, **kwargs)
        if _changes(func, kwargs) or (isinstance(result, Tensor) and (is_small(result) or func in MAKE)):
            shadow = self._run_on_shadows(func, args, kwargs)
            if isinstance(result, Tensor):
                self._known[id(result)] = (result, shadow)
        return result

    def _with_others(
        self, func: Callable[..., Any], tensors: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a function on tensors of which not all have a shadow; those that have come to where the others are."""
        if not any(id(tensor) in self._known for tensor in tensors):
            return func(*args, **kwargs)
        if is_small(tensors[0]) and _changes(func, kwargs):
            self._known.clear()  # a shadow may have been changed, or what it is a view of
            return func(*args, **kwargs)
        others = [tensor.device for tensor in tensors if id(tensor) not in self._known]
        device = next((other for other in others if other != _CPU), None)
        if device is None:  # numbers in main memory, which go with any device
            return func(*args, **kwargs)

        def bring(value: Any) -> Any:
            shadow = self._known[id(value)][1] if isinstance(value, Tensor) and id(value) in self._known else None
            if shadow is not None and func in (Tensor.__getitem__, Tensor.__setitem__) and shadow.dtype == torch.bool:
                return tuple(sent(index, device) for index in shadow.nonzero(as_tuple=True))
            return value

        args, kwargs = tuple(map(bring, args)), {name: bring(value) for name, value in kwargs.items()}
        args, kwargs = self._brought(device, args, kwargs)
        return func(*args, **kwargs)

    def _brought(self, device: torch.device, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Return arguments with what has a shadow on one device, from main memory."""

        def bring(value: Any) -> Any:
            if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
                return type(value)(map(bring, value))
            if not isinstance(value, Tensor) or id(value) not in self._known or value.device == device:
                return value
            shadow = self._known[id(value)][1]
            moved = sent(shadow, device)
            self._known[id(moved)] = (moved, shadow)
            return moved

        return tuple(map(bring, args)), {name: bring(value) for name, value in kwargs.items()}

    def _run_on_shadows(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*map(self._shadow_of, args), **{name: self._shadow_of(value) for name, value in kwargs.items()})

    def _found(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a search in main memory has found, on the device."""
        device, found = args[0].device, self._run_on_shadows(func, args, kwargs)
        shadows = _tensors_in([found])
        results = [sent(shadow, device) for shadow in shadows]
        self._known |= {id(tensor): (tensor, shadow) for tensor, shadow in zip(results, shadows, strict=True)}
        return results[0] if isinstance(found, Tensor) else tuple(results)

    def _sent(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return a tensor on another device, from main memory; nothing if it is to stay where it is."""
        tensor, shadow = self._known[id(args[0])]
        rest = {name: value for name, value in kwargs.items() if name not in ("copy", "memory_format")}
        device, dtype, _, _ = torch._C._nn._parse_to(*args[1:], **rest)
        if device is None or device == tensor.device or device.type == "cpu":
            return None
        shadow = shadow if dtype is None else shadow.to(dtype)
        moved = sent(shadow, device)
        if is_small(moved):
            self._known[id(moved)] = (moved, shadow)
        return moved

    def _shadow_of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._known[id(value)][1]
        if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
            return type(value)(map(self._shadow_of, value))
        return _CPU if isinstance(value, torch.device) else value


def _changes(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a function changes a tensor that it is given."""
    name = getattr(func, "__name__", "")
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return in_place or kwargs.get("out") is not None


def _draws(func: Callable[..., Any]) -> bool:
    """Tell whether the result of a function is not its arguments' alone."""
    return any(name in getattr(func, "__name__", "") for name in _DRAWS)


def _tensors_in(values: Iterable[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors_in(value)
    return found
