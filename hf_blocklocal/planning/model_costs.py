"""What the parts of a model cost in a training step, and what a block of some of them then costs.

Sums of numbers that somebody else has measured: no tensors, no devices, no Hugging Face.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from hf_blocklocal.cut.partition import Span


@dataclass(frozen=True)
class LayerCosts:
    """What one layer costs in a training step; what runs before the first or behind the last is added to those.

    A layer that opens a block is told apart, because nobody asks it for the gradient of its input.

    Attributes:
        forward: Operations of the forward pass.
        backward: Operations of the backward pass, behind another layer of its block.
        backward_opening: Operations of the backward pass as the first layer of a block.
        saved_bytes: What autograd saves, behind another layer of its block.
        saved_bytes_opening: What autograd saves as the first layer of a block.
        message_bytes: What travels up if a block ends with this layer.
    """

    forward: float
    backward: float
    backward_opening: float
    saved_bytes: int
    saved_bytes_opening: int
    message_bytes: int


@dataclass(frozen=True)
class HeadCosts:
    """What the head of a block costs that ends with a certain layer.

    Attributes:
        operations: Operations of its forward and backward pass.
        operations_in_first: The same in the first block, which may use weights itself that its head borrows, such as
            a tied embedding, and then wants their gradient.
        saved_bytes: What autograd saves in it.
        saved_bytes_in_first: The same in the first block.
        parameters: Parameters of its own.
        weight_bytes: Their bytes.
        borrows: Names of the model's weights that it borrows and a later block owns.
        trains: Names of those of which it trains copies of its own.
    """

    operations: float
    operations_in_first: float
    saved_bytes: int
    saved_bytes_in_first: int
    parameters: int
    weight_bytes: int
    borrows: frozenset[str] = frozenset()
    trains: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Weight:
    """One parameter tensor of the model.

    Attributes:
        parameters: Numbers in it.
        weight_bytes: Their bytes.
        trainable: Whether it is trained.
        used_by: Layers that use it in ascending order, the last of which owns it: its block has the optimizer state.
        inside: Whether it is a layer's own.
    """

    parameters: int
    weight_bytes: int
    trainable: bool
    used_by: tuple[int, ...]
    inside: bool = False


@dataclass(frozen=True)
class ModelCosts:
    """What the parts of a model cost in a training step.

    Attributes:
        layers: Costs of each layer in the order of execution.
        heads: For each layer but the last, costs of the head of a block that ends with it.
        weights: The parameters of the model by name.
    """

    layers: tuple[LayerCosts, ...]
    heads: tuple[HeadCosts, ...]
    weights: Mapping[str, Weight]

    def operations(self, span: Span) -> float:
        """Return the operations of a block with its head, forward and backward."""
        own = self._forward[span.stop] - self._forward[span.start]
        own += self._backward[span.stop] - self._backward[span.start + 1] + self.layers[span.start].backward_opening
        if span.last == len(self.heads):
            return own
        head = self.heads[span.last]
        return own + (head.operations_in_first if span.start == 0 else head.operations)

    def activations(self, span: Span) -> int:
        """Return what autograd saves in a block, without its head."""
        rest = self._saved[span.stop] - self._saved[span.start + 1]
        return int(rest) + self.layers[span.start].saved_bytes_opening

    def head_activations(self, span: Span) -> int:
        """Return what autograd saves in the head of a block."""
        if span.last == len(self.heads):
            return 0
        head = self.heads[span.last]
        return head.saved_bytes_in_first if span.start == 0 else head.saved_bytes

    def trained(self, span: Span) -> tuple[int, int]:
        """Return number and bytes of the parameters that a block trains, those of its head included."""
        head = self.heads[span.last] if span.last < len(self.heads) else None
        numbers, sizes = self._trained
        return (
            numbers[span.stop] - numbers[span.start] + (head.parameters if head else 0),
            sizes[span.stop] - sizes[span.start] + (head.weight_bytes if head else 0),
        )

    def frozen_bytes(self, span: Span) -> int:
        """Return the bytes of the parameters that a block owns and nobody trains."""
        owned = (weight for weight in self.weights.values() if not weight.trainable)
        return sum(weight.weight_bytes for weight in owned if weight.used_by[-1] in span)

    def inside(self, span: Span) -> tuple[list[int], list[int]]:
        """Return, for each layer of a block, the bytes of its own parameters, and of those that are trained."""
        held, trained = self._inside
        return held[span.start : span.stop], trained[span.start : span.stop]

    def foreign_bytes(self, span: Span) -> int:
        """Return the bytes of parameters that a block uses and a later one owns, such as a tied embedding."""
        return sum(
            weight.weight_bytes
            for weight in self._shared
            if weight.used_by[-1] >= span.stop and any(layer in span for layer in weight.used_by)
        )

    def borrowed_bytes(self, stops: Sequence[int], owned_from: int) -> int:
        """Return the bytes of what the heads of blocks borrow from layers from a certain one on, each weight once.

        Args:
            stops: For each of the blocks, the layer behind its last.
            owned_from: First layer whose weights count.
        """
        names = frozenset().union(*(self.heads[stop - 1].borrows for stop in stops if stop <= len(self.heads)))
        return sum(self.weights[name].weight_bytes for name in names if self.weights[name].used_by[-1] >= owned_from)

    def trained_copies(self, span: Span) -> tuple[int, int]:
        """Return number and bytes of the copies of later blocks' weights that the head of a block trains."""
        names = self.heads[span.last].trains if span.last < len(self.heads) else frozenset()
        weights = [self.weights[name] for name in names if self.weights[name].used_by[-1] >= span.stop]
        learning = [weight for weight in weights if weight.trainable]
        return sum(weight.parameters for weight in learning), sum(weight.weight_bytes for weight in learning)

    @cached_property
    def _forward(self) -> list[float]:
        return [0.0, *accumulate(layer.forward for layer in self.layers)]

    @cached_property
    def _backward(self) -> list[float]:
        return [0.0, *accumulate(layer.backward for layer in self.layers)]

    @cached_property
    def _saved(self) -> list[float]:
        return [0.0, *accumulate(layer.saved_bytes for layer in self.layers)]

    @cached_property
    def _trained(self) -> tuple[list[int], list[int]]:
        numbers, sizes = [0] * len(self.layers), [0] * len(self.layers)
        for weight in self.weights.values():
            if weight.trainable:
                numbers[weight.used_by[-1]] += weight.parameters
                sizes[weight.used_by[-1]] += weight.weight_bytes
        return [0, *accumulate(numbers)], [0, *accumulate(sizes)]

    @cached_property
    def _inside(self) -> tuple[list[int], list[int]]:
        held, trained = [0] * len(self.layers), [0] * len(self.layers)
        for weight in self.weights.values():
            if weight.inside:
                held[weight.used_by[-1]] += weight.weight_bytes
                trained[weight.used_by[-1]] += weight.weight_bytes if weight.trainable else 0
        return held, trained

    @cached_property
    def _shared(self) -> list[Weight]:
        return [weight for weight in self.weights.values() if len(weight.used_by) > 1]
