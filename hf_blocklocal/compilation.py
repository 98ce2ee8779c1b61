"""Compile each layer instead of the whole model, so that the hooks between layers stay out of the graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn


@contextmanager
def layers_compiled(layers: Iterable[nn.Module], plugin: Any) -> Iterator[None]:
    """Compile layers as accelerate would compile the model, and keep it from doing that inside the `with`.

    Args:
        layers: The layers.
        plugin: accelerate's settings for `torch.compile`.
    """
    backend = plugin.backend
    if backend != DynamoBackend.NO:
        for layer in layers:
            if "forward" not in vars(layer):
                layer.forward = torch.compile(layer.forward, **plugin.to_kwargs())
    plugin.backend = DynamoBackend.NO
    try:
        yield
    finally:
        plugin.backend = backend
