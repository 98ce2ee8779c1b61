"""A language model's own loss without all of its logits at once.

Over a vocabulary, the logits of the last block take memory that no cut divides. Here they are made for some tokens at
a time, and made again for the backward pass: the loss is the same sum in another order, for one more product with the
language-model head.
"""

# Shapes: B batch, S sequence, D hidden width, V vocabulary, N tokens of the batch.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from hf_blocklocal.anatomy.embeddings import output_embedding
from hf_blocklocal.anatomy.lending import replaced_forward
from hf_blocklocal.anatomy.modes import evaluation_mode
from hf_blocklocal.errors import UnsupportedSettingError


# By the type of loss that a model names: whether position i predicts label i + 1.
_SHIFTS = {"ForCausalLM": True, "ForMaskedLM": False}
# Logits are this much larger when the two losses are compared, so that a cap behind the head shows with weights at
# random too, whose logits do not reach it. A power of two, which rounds nothing.
_MAGNIFIED = 64.0
# What autograd calls operations that may as well come before a product without bias.
_SCALES = ("MulBackward0", "DivBackward0")


class ChunkedLoss:
    """Computes the loss of a language model chunk by chunk.

    Args:
        model: A transformers model whose loss is `loss_function` of what its language-model head returns.
        tokens: Tokens of a chunk.

    Raises:
        UnsupportedSettingError: If the model has no such head, or another loss.
    """

    def __init__(self, model: nn.Module, tokens: int) -> None:
        self._model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._head, self._tokens = output_embedding(model), tokens
        self._kind = getattr(self._model, "loss_type", None) or "ForCausalLM"  # what transformers falls back to
        if self._head is None or self._kind not in _SHIFTS:
            raise UnsupportedSettingError(
                f"chunked_loss={tokens} is for losses over a vocabulary, and that of {type(self._model).__name__} is "
                f"{self._kind!r}. Known are {sorted(_SHIFTS)}. Leave it out."
            )
        self._called = False

    @contextmanager
    def in_place(self, paused: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Let the model compute its loss in chunks, in the forward passes inside the `with`; they return no logits.

        Args:
            paused: Whether the model runs for another purpose now, and is to be as it is.

        Raises:
            UnsupportedSettingError: In a forward pass that computes its loss elsewhere, as some trainers have it.
        """
        head, model = self._head, self._model
        own_head, own_loss = head.forward, model.loss_function

        def pass_on(hidden: Tensor) -> Tensor:
            return own_head(hidden) if paused() else hidden

        def loss_of(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if paused():
                return own_loss(logits, *args, **kwargs)
            return self._in_chunks(own_head, own_loss, logits, *args, **kwargs)

        def without_logits(_model: nn.Module, _inputs: Any, output: Any) -> Any:
            if paused():
                return None
            if not self._called:
                raise UnsupportedSettingError(self._refusal("is not computed by its loss_function"))
            self._called = False
            if not isinstance(output, Mapping) or "logits" not in output:
                return None
            return type(output)(**{name: value for name, value in output.items() if name != "logits"})

        self._called = False
        handle = model.register_forward_hook(without_logits)
        try:
            with replaced_forward(head, pass_on), _replaced_loss(model, loss_of):
                yield
        finally:
            handle.remove()

    def _in_chunks(
        self,
        head: Callable[[Tensor], Tensor],
        own_loss: Callable[..., Tensor],
        hidden_BSD: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return what `own_loss` would make of all logits."""
        self._called = True
        shifts = _SHIFTS[self._kind]
        if shifts and shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        labels_N = (shift_labels if shifts else labels).flatten().to(hidden_BSD.device)
        hidden_ND = hidden_BSD.flatten(0, -2)
        count = (labels_N != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        named = "shift_labels" if shifts else "labels"

        def loss_of(hidden: Tensor, labels: Tensor) -> Tensor:
            # With a count, the loss is the sum over the tokens divided by it: chunks add up.
            given = {"labels": None, named: labels, "num_items_in_batch": count, "ignore_index": ignore_index}
            return own_loss(head(hidden), vocab_size=vocab_size, **given, **kwargs)

        chunks = zip(hidden_ND.split(self._tokens), labels_N.split(self._tokens), strict=True)
        # The head may have dropout, such as that of an adapter: the second time it draws what it drew the first time.
        return torch.stack([checkpoint(loss_of, *chunk, use_reentrant=False) for chunk in chunks]).sum()

    def check(self, inputs: Mapping[str, Any]) -> None:
        """Run the model both ways, with every label counting and with logits magnified.

        Where tensors have no values to compare, the way of the logits from the head to the loss is looked at.

        Args:
            inputs: A small batch with labels.

        Raises:
            UnsupportedSettingError: If the loss is not the same.
        """
        own_head = self._head.forward
        magnified = replaced_forward(self._head, lambda hidden: _MAGNIFIED * own_head(hidden))
        inputs = {**inputs, "labels": inputs["labels"].clamp(min=0)}
        with torch.no_grad(), evaluation_mode(self._model), magnified:
            own = self._model(**inputs).loss
            try:
                with self.in_place():
                    chunked = self._model(**inputs).loss
            except UnsupportedSettingError:
                raise
            except (RuntimeError, TypeError, AttributeError, ValueError, IndexError) as error:
                raise UnsupportedSettingError(self._refusal("cannot be computed so")) from error
        if isinstance(chunked, FakeTensor):
            self._check_way(inputs)
            return
        # In lower precision, a product of other shape rounds otherwise.
        exact = all(parameter.dtype == torch.float32 for parameter in self._head.parameters())
        if not torch.allclose(chunked.float(), own.float(), rtol=1e-4 if exact else 1e-2):
            raise UnsupportedSettingError(
                self._refusal("is made of logits that are changed behind the head, and would be another one")
            )

    def _check_way(self, inputs: Mapping[str, Any]) -> None:
        """Refuse a model that does more with its logits than to scale them."""
        own_head, own_loss = self._head.forward, self._model.loss_function
        made: list[Any] = []
        given: list[Any] = []

        def head(hidden: Tensor) -> Tensor:
            logits = own_head(hidden)
            made.append(logits.grad_fn)
            return logits

        def loss(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            given.append(logits.grad_fn)
            return own_loss(logits, *args, **kwargs)

        noted = replaced_forward(self._head, head), _replaced_loss(self._model, loss)
        with torch.enable_grad(), evaluation_mode(self._model), noted[0], noted[1]:
            self._model(**inputs)
        node = given[-1]
        while node is not made[-1]:
            before = [parent for parent, _ in node.next_functions if parent is not None]
            if node.name() not in _SCALES or len(before) != 1 or getattr(self._head, "bias", None) is not None:
                raise UnsupportedSettingError(
                    self._refusal(
                        f"is made of logits that are changed behind the head, by {node.name()}, and may be another "
                        "one; a model with weights shows whether it is"
                    )
                )
            node = before[0]

    def _refusal(self, reason: str) -> str:
        name = type(self._model).__name__
        return f"chunked_loss={self._tokens} does not work for {name}: its loss {reason}. Leave it out."


@contextmanager
def _replaced_loss(model: nn.Module, loss: Callable[..., Tensor]) -> Iterator[None]:
    """Let a model compute another loss inside the `with`."""
    own, was_set = model.loss_function, "_loss_function" in vars(model)
    model.loss_function = loss
    try:
        yield
    finally:
        if was_set:
            model.loss_function = own
        else:
            del model._loss_function
