"""Take apart what a layer returns into a description and tensors, and put it together again elsewhere.

The description is JSON: nothing that arrives is ever run or unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_blocklocal.errors import UnsupportedSettingError


@dataclass(frozen=True)
class TensorForm:
    """What a receiver must know of a tensor before it arrives."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorForm:
        """Describe a tensor."""
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return getattr(torch, self.dtype).itemsize

    def of_one(self) -> TensorForm:
        """Return the form of a single number of the same kind."""
        return TensorForm(self.dtype, (1,))

    def empty(self, device: torch.device, *, pinned: bool = False) -> Tensor:
        """Return a tensor of this form to receive into, in pinned memory if a GPU is to fetch it from there."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype), device=device, pin_memory=pinned)


def take_apart(value: Any) -> tuple[Any, list[Tensor]]:
    """Return a JSON-able description of a value, and the tensors in it.

    Args:
        value: Tensors, numbers, strings, booleans and nothing, in nested tuples, lists and plain dictionaries.

    Raises:
        UnsupportedSettingError: If it holds anything else.
    """
    tensors: list[Tensor] = []
    return _describe(value, tensors), tensors


def put_together(description: Any, tensors: Sequence[Tensor]) -> Any:
    """Return the value that was taken apart, with these tensors in it."""
    kind, content = description
    if kind == "tensor":
        return tensors[content]
    if kind == "plain":
        return content
    if kind == "dict":
        return {key: put_together(item, tensors) for key, item in content.items()}
    items = [put_together(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _describe(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return ["tensor", len(tensors) - 1]
    if value is None or isinstance(value, bool | int | float | str):
        return ["plain", value]
    if type(value) in (tuple, list, torch.Size):
        return ["list" if type(value) is list else "tuple", [_describe(item, tensors) for item in value]]
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return ["dict", {key: _describe(item, tensors) for key, item in value.items()}]
    raise UnsupportedSettingError(
        f"A {type(value).__name__}, which a layer hands on or an optimizer keeps, cannot be sent to another process: "
        "only tensors, plain values, tuples, lists and dictionaries can. Train this model in one process: "
        "block_parallel_size=1."
    )


def encoded(header: Mapping[str, Any], size: int | None = None) -> Tensor:
    """Write a header as JSON into a tensor of bytes.

    Args:
        header: What to write.
        size: Bytes of the tensor; as many as it takes by default.

    Raises:
        UnsupportedSettingError: If it does not fit.
    """
    text = json.dumps(header, separators=(",", ":")).encode()
    size = len(text) if size is None else size
    if len(text) > size:
        raise UnsupportedSettingError(
            f"A layer hands on so many values that their description takes {len(text)} bytes, more than the {size} "
            "of a message header. Train this model in one process: block_parallel_size=1."
        )
    return torch.frombuffer(bytearray(text.ljust(size)), dtype=torch.uint8)


def decoded(header: Tensor) -> dict[str, Any]:
    """Read a header back."""
    return json.loads(header.numpy().tobytes())
