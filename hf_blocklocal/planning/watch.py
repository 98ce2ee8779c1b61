"""Watch a training step layer by layer: operations counted and bytes saved at its turning points.

Only hooks, all of them taken back; what the numbers are good for is not decided here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from hf_blocklocal.anatomy.signals import beside_hidden, first_tensor
from hf_blocklocal.cut.blocks import Boundaries
from hf_blocklocal.records.memory import ActivationMeter
from hf_blocklocal.records.operations import operation_counter


def counter() -> FlopCounterMode:
    """Return a counter of operations that knows the attention of the CPU too, which torch's own leaves out."""
    attention = torch.ops.aten
    return operation_counter(
        {
            attention._scaled_dot_product_flash_attention_for_cpu: _attention,
            attention._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        }
    )


class Marks:
    """Operations counted and bytes saved at the turning points of a step, by layer.

    Attributes:
        left: When it has returned.
        sent: When the backward pass of a loss starts that stands behind it.
        arrived: When the gradient has arrived at its output.
        done: When that backward pass has ended.
        message_bytes: What a message holds that goes up from there.
    """

    def __init__(self, num_layers: int) -> None:
        empty: list[tuple[float, int]] = [(0.0, 0)] * num_layers
        self.left, self.sent, self.arrived, self.done = (list(empty) for _ in range(4))
        self.message_bytes = [0] * num_layers


class Watch:
    """Hooks that note the marks of one step.

    Args:
        model: The model.
        heads: The heads of its blocks; their weights do not count as saved, nor do the model's.
        boundaries: Its cut. While that is suspended, nothing is noted.
        marks: Where to note.
    """

    def __init__(self, model: nn.Module, heads: Iterable[nn.Module], boundaries: Boundaries, marks: Marks) -> None:
        self._boundaries, self._marks = boundaries, marks
        self._layers = [model.get_submodule(path) for path in boundaries.cut.layers]
        self._ends = iter([span.last for span in boundaries.cut.spans])
        self._flops, self._saved = counter(), ActivationMeter(nn.ModuleList([model, *heads]))
        self._handed_on: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count inside the `with`."""
        with ExitStack() as stack:
            for index, layer in enumerate(self._layers):
                stack.callback(layer.register_forward_pre_hook(partial(self._enter, index), with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(partial(self._leave, index)).remove)
            stack.enter_context(self._flops)
            stack.enter_context(self._saved)
            yield

    def backward(self, loss: Tensor, **options: Any) -> None:
        """Send a loss back."""
        layer = next(self._ends)
        self._marks.sent[layer] = self._now()
        loss.backward(**options)
        self._marks.done[layer] = self._now()

    def _now(self) -> tuple[float, int]:
        return self._flops.get_total_flops(), self._saved.live_bytes

    def _enter(self, index: int, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._boundaries.is_suspended or index == 0:
            return
        beside = [tensor for tensor in _tensors((args[1:], kwargs)) if tensor.requires_grad]
        self._marks.message_bytes[index - 1] = _distinct_bytes([*self._handed_on, *beside])

    def _leave(self, index: int, _layer: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if self._boundaries.is_suspended:
            return
        self._marks.left[index] = self._now()
        hidden = first_tensor(output)
        self._handed_on = [hidden.detach(), *_tensors(beside_hidden(output))]
        if hidden.requires_grad:
            hidden.register_hook(lambda _gradient: self._arrive(index))

    def _arrive(self, index: int) -> None:
        self._marks.arrived[index] = self._now()


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _distinct_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(
        {tensor.untyped_storage()._cdata: tensor.numel() * tensor.element_size() for tensor in tensors}.values()
    )


def _attention(query_shape: Any, key_shape: Any, value_shape: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)
