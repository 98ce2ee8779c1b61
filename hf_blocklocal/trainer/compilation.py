"""Compile each layer instead of the whole model, so that the hooks between layers stay out of the graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn

from hf_blocklocal.errors import UnsupportedSettingError


@contextmanager
def layers_compiled(layers: Sequence[nn.Module], plugin: Any, *, overlap: int) -> Iterator[None]:
    """Compile layers as accelerate would compile the model, and keep it from doing that inside the `with`.

    Args:
        layers: The layers; without any, as with a single block, nothing is changed.
        plugin: accelerate's settings for `torch.compile`.
        overlap: How many blocks below its own a loss reaches.

    Raises:
        UnsupportedSettingError: If layers are to be compiled and to be gone through backwards more than once.
    """
    if not layers:
        yield
        return
    backend = plugin.backend
    if backend != DynamoBackend.NO:
        if overlap > 0:
            raise UnsupportedSettingError(
                f"overlap={overlap} and torch_compile exclude each other: a compiled layer frees what its backward "
                "pass needs in the first one, and with overlap there are several. Leave one of the two out."
            )
        for layer in layers:
            if "forward" not in vars(layer):
                # Bound to the layer, so that a copy of it runs with the weights of the copy.
                layer.forward = MethodType(torch.compile(type(layer).forward, **plugin.to_kwargs()), layer)
    plugin.backend = DynamoBackend.NO
    try:
        yield
    finally:
        plugin.backend = backend
