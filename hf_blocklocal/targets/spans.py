"""Targets that are places in the input: where the answer to a question starts, and where it ends.

Every sample has two targets, each 1 of the S positions of its sequence. A readout gives every position two numbers,
how likely it is the first and how likely the last of the answer, and a target chooses among the positions of its
sample.
"""

# Shapes: B batch, S sequence, D hidden width, N targets that count.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_blocklocal.errors import TargetError
from hf_blocklocal.targets.batch import Alignment, Pooling, Targets, Task, two_dimensional_mask


SPANS = Task("spans", 2, per_position=True)


@dataclass(frozen=True)
class SpanTargets(Targets):
    """The starts and ends of one micro-batch that count, flat: all starts, then all ends.

    Attributes:
        edges_N: 0 for a start, 1 for an end.
    """

    edges_N: Tensor | None = None

    def rows(self, hidden: Tensor, alignment: Alignment, pooling: Pooling) -> tuple[Tensor, Tensor | None]:
        """Return every position of every sample, (B, S, D): each of them may be the answer."""
        return hidden, None

    def answers(self, read_BS2: Tensor, index_N: Tensor | None, *, as_model: bool = False) -> Tensor:
        """Return for each target what is read at every position of its sample, (N, S).

        Padding is no answer; but to the models' own loss it is one like any other, and borrowed layers learn by that.
        """
        read_NS = read_BS2[self.samples_N, :, self.edges_N]
        if self.mask_BS is None or as_model:
            return read_NS
        return read_NS.masked_fill(self.mask_BS[self.samples_N] == 0, torch.finfo(read_NS.dtype).min)


def has_spans(inputs: Mapping[str, Any]) -> bool:
    """Tell whether a batch asks for places in its input."""
    return inputs.get("labels") is None and inputs.get("start_positions") is not None


def sequence_shape(inputs: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return samples and positions of the input that spans are places in, (B, S).

    Raises:
        TargetError: If the batch holds no text.
    """
    for name in ("input_ids", "inputs_embeds", "attention_mask"):
        if inputs.get(name) is not None:
            batch, length = inputs[name].shape[:2]
            return batch, length
    raise TargetError(
        f"The batch holds start_positions, and no input_ids that they could be places in, only {sorted(inputs)}."
    )


def read_spans(inputs: Mapping[str, Tensor]) -> SpanTargets:
    """Flatten starts and ends to the targets that count.

    As in the models' own loss, a place behind the end of the sequence does not count, and one before it is the first.

    Args:
        inputs: The model's inputs with `start_positions` and `end_positions`.
    """
    length = sequence_shape(inputs)[1]
    places_2B = torch.stack([inputs[name].reshape(-1) for name in ("start_positions", "end_positions")]).clamp(min=0)
    edges_N, samples_N = (places_2B < length).nonzero(as_tuple=True)
    return _targets_at(edges_N, samples_N, places_2B[edges_N, samples_N], inputs)


def spans_without_values(inputs: Mapping[str, Tensor]) -> SpanTargets:
    """Return targets as `read_spans` does, for places without values: all of them are taken to count.

    Args:
        inputs: The model's inputs with `start_positions` and `end_positions`.
    """
    starts_B = inputs["start_positions"]
    samples_B = torch.arange(len(starts_B), device=starts_B.device)
    edges_N = torch.cat([torch.zeros_like(samples_B), torch.ones_like(samples_B)])
    return _targets_at(edges_N, samples_B.repeat(2), torch.zeros_like(edges_N), inputs)


def _targets_at(edges_N: Tensor, samples_N: Tensor, places_N: Tensor, inputs: Mapping[str, Tensor]) -> SpanTargets:
    return SpanTargets(SPANS, places_N, samples_N=samples_N, mask_BS=two_dimensional_mask(inputs), edges_N=edges_N)


def answer_logits(outputs: Any) -> Tensor:
    """Return what a transformers model answers, its logits, or (B, S, 2) if it answers with spans."""
    spans = span_logits(outputs)
    return outputs.logits if spans is None else spans


def span_logits(outputs: Any) -> Tensor | None:
    """Return what a model says of every position, (B, S, 2); nothing if it answers in another form."""
    if not isinstance(outputs, Mapping):
        return None
    edges = [outputs.get(name) for name in ("start_logits", "end_logits")]
    return torch.stack(edges, dim=-1) if all(isinstance(edge, Tensor) for edge in edges) else None
