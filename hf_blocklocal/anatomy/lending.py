"""Borrow from a running model: its forward, that of a layer, weights, gradients, statistics. All is given back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn


# What layers that normalise over a batch keep of earlier ones.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def taken_by(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return those inputs that the forward of a model takes; others are for a loss of the user's own."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(inputs)
    taken = {parameter.name for parameter in parameters}
    return {name: value for name, value in inputs.items() if name in taken}


def run_inside(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run a model in the middle of its own forward pass, and return what it returns."""
    # A forward that accelerate has put into autocast must not run inside of itself: autocast would never be left.
    with replaced_forward(model, MethodType(type(model).forward, model)):
        return model(**inputs)


@contextmanager
def replaced_forward(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a layer run another forward inside the `with`."""
    own = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


@contextmanager
def replaced_tensors(model: nn.Module, stand_ins: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Let other tensors stand for parameters and buffers of a model inside the `with`, wherever it uses them.

    Args:
        model: The model.
        stand_ins: For each parameter or buffer that is to be replaced, what stands for it.
    """
    own = [
        (holder, name, tensor)
        for module in model.modules()
        for holder in (module._parameters, module._buffers)
        for name, tensor in holder.items()
        if tensor in stand_ins
    ]
    for holder, name, tensor in own:
        holder[name] = stand_ins[tensor]
    try:
        yield
    finally:
        for holder, name, tensor in own:
            holder[name] = tensor


@contextmanager
def read_only(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Keep gradients from parameters inside the `with`."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def statistics_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics that a module keeps itself, such as those of a batch norm."""
    return {name: tensor for name in _STATISTICS if (tensor := module._buffers.get(name)) is not None}


@contextmanager
def statistics_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules in training mode update copies of their running statistics inside the `with`, and drop those."""
    own = [
        (module, name, tensor)
        for module in modules
        if module.training
        for name, tensor in statistics_of(module).items()
    ]
    for module, name, tensor in own:
        module._buffers[name] = tensor.clone()
    try:
        yield
    finally:
        for module, name, tensor in own:
            module._buffers[name] = tensor
