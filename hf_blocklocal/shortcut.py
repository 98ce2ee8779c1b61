"""Run what lies above a block with only some of its layers, read-only: the model itself as the head of a block.

The model's own forward runs a second time, from the end of the block on. Layers that are left out hand their input on;
nothing needs to know what masks, rotary embeddings, norms or task heads the model has. Parameters outside the block
get no gradient. With all layers above, the loss has the very gradient of backpropagation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_blocklocal.blocks import Cut


def borrowed_layers(cut: Cut, block: int, count: int) -> tuple[int, ...]:
    """Choose the layers that the head of a block borrows.

    Args:
        cut: Where the model is cut.
        block: The block.
        count: Layers to borrow, at most all above the block.

    Returns:
        Indices of layers above the block, evenly spread, the last layer among them.
    """
    first = cut.spans[block].stop
    above = len(cut.layers) - first
    count = min(count, above)
    return tuple(first + (number + 1) * above // count - 1 for number in range(count))


class Shortcut:
    """The way from the end of a block to the model's logits.

    Args:
        model: The model.
        cut: Where it is cut.
        forms: For each layer, 0 if it returns its hidden state, n if it returns a tuple of n that starts with it.
        count: Layers that every head borrows.
        reached: For each block, the names of the parameters that its own layers use.
        confines: Whether the language-model head may be confined to some tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        cut: Cut,
        forms: Sequence[int],
        count: int,
        reached: Sequence[set[str]],
        *,
        confines: bool = False,
    ) -> None:
        self.model = model
        self.confines = confines
        self._layers = [model.get_submodule(path) for path in cut.layers]
        self._ends = [span.last for span in cut.spans]
        self._forms = forms
        self._kept = [borrowed_layers(cut, block, count) for block in range(cut.num_blocks - 1)]
        self._foreign = [
            [parameter for name, parameter in model.named_parameters() if name not in mine] for mine in reached
        ]

    def logits(self, block: int, hidden: Tensor, inputs: Mapping[str, Any], tokens_C: Tensor | None = None) -> Tensor:
        """Run the model from the end of a block.

        Args:
            block: The block.
            hidden: Its output, (B, S, D).
            inputs: The model's inputs; the labels are left out.
            tokens_C: Tokens to which a language-model head is confined; None for the whole vocabulary.

        Returns:
            The model's logits, (B, C) or (B, S, C).
        """
        with ExitStack() as stack:
            if tokens_C is not None:
                stack.enter_context(_confined_to(self.model.get_output_embeddings(), tokens_C))
            for index, layer in enumerate(self._layers):
                if index not in self._kept[block]:
                    given = hidden if index == self._ends[block] else None
                    stack.enter_context(_replaced_forward(layer, _stub(given, self._forms[index])))
            return _logits(self.model, inputs)

    @contextmanager
    def read_only(self, block: int) -> Iterator[None]:
        """Keep gradients from all parameters that the block's own layers do not use."""
        trainable = [parameter for parameter in self._foreign[block] if parameter.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)


@torch.no_grad()
def can_be_confined(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Tell whether a model gives the right logits of some tokens when its language-model head knows no others.

    Args:
        model: The model, without dropout.
        inputs: A small batch.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    tokens_C = torch.tensor([1, 0], device=head.weight.device)
    logits = _logits(model, inputs)
    with _confined_to(head, tokens_C):
        try:
            confined = _logits(model, inputs)
        except RuntimeError:  # something of the size of the vocabulary is added to them
            return False
    expected = logits[..., tokens_C]
    return confined.shape == expected.shape and torch.allclose(confined, expected, rtol=1e-3, atol=1e-4)


def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    # A forward that accelerate has put into autocast must not run inside of itself: autocast would never be left.
    with _replaced_forward(model, MethodType(type(model).forward, model)):
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]


def _confined_to(head: nn.Linear, tokens_C: Tensor) -> AbstractContextManager[None]:
    def forward(hidden: Tensor) -> Tensor:
        return F.linear(hidden, head.weight[tokens_C], None if head.bias is None else head.bias[tokens_C])

    return _replaced_forward(head, forward)


def _stub(given: Tensor | None, form: int) -> Callable[..., Any]:
    """Return a forward that hands its input on, or a given hidden state in its place."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = given if given is not None else args[0] if args else kwargs["hidden_states"]
        return hidden if form == 0 else (hidden, *[None] * (form - 1))

    return forward


@contextmanager
def _replaced_forward(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own
