"""Change for a while how a model runs: without dropout, without packing, without recording; then all is as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import _active_collector

from hf_blocklocal.anatomy.lending import replaced_forward


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back into the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with padding_kept():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def outputs_not_recorded() -> Iterator[None]:
    """Keep the model from recording outputs, such as router logits, a second time.

    A backward pass inside the forward pass recomputes checkpointed layers while the model is still recording.
    """
    token = _active_collector.set(None)
    try:
        yield
    finally:
        _active_collector.reset(token)


class _CheckpointedForward(GradientCheckpointingLayer):
    """The forward of a layer, checkpointed as the layer's whole call would be."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.gradient_checkpointing = True
        self._gradient_checkpointing_func = layer._gradient_checkpointing_func
        self._can_checkpoint_with_cache = layer._can_checkpoint_with_cache
        self.forward = layer.forward


@contextmanager
def padding_kept() -> Iterator[None]:
    """Keep torch's own encoder from packing padded batches: what its layers then hand on has no shape to look at."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def hooks_outside_checkpoint(layer: nn.Module) -> Iterator[None]:
    """Keep the hooks of a layer from running inside its activation checkpoint, and again in its recomputation.

    Args:
        layer: A layer; its forward is checkpointed inside the `with`, if its whole call would be.
    """
    # Until transformers 5.23: later versions checkpoint the forward themselves.
    whole_calls = isinstance(layer, GradientCheckpointingLayer) and "__call__" in vars(GradientCheckpointingLayer)
    if not (whole_calls and layer.gradient_checkpointing and layer.training):
        yield
        return
    checkpointed = _CheckpointedForward(layer)
    layer.gradient_checkpointing = False
    try:
        with replaced_forward(layer, checkpointed.__call__):
            yield
    finally:
        layer.gradient_checkpointing = True


@contextmanager
def everything_trainable(model: nn.Module) -> Iterator[None]:
    """Let gradients reach frozen parameters too, inside the `with`."""
    frozen = [p for p in model.parameters() if not p.requires_grad and torch.is_floating_point(p)]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
