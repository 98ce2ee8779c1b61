"""Ask a model for its logits while it runs, of its whole vocabulary or of some tokens."""

# Shapes: C tokens that are asked for.

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_blocklocal.anatomy.layers import is_encoder_decoder
from hf_blocklocal.anatomy.lending import replaced_forward, run_inside
from hf_blocklocal.targets.spans import has_spans, span_logits


@torch.no_grad()
def can_be_confined(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Tell whether a model gives the right logits of some tokens when its language-model head knows no others.

    Args:
        model: The model, without dropout.
        inputs: A small batch.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or _needs_labels(model, inputs):  # a loss of labels needs the whole vocabulary
        return False
    tokens_C = torch.tensor([1, 0], device=head.weight.device)
    logits = logits_of(model, inputs)
    with confined_to(head, tokens_C):
        try:
            confined = logits_of(model, inputs)
        except RuntimeError:  # something of the size of the vocabulary is added to them
            return False
    expected = logits[..., tokens_C]
    return confined.shape == expected.shape and torch.allclose(confined, expected, rtol=1e-3, atol=1e-4)


def logits_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Run a model in the middle of its own forward pass, and return its logits; of spans, those of start and end.

    Args:
        model: The model.
        inputs: Its inputs; the labels are left out, unless a decoder's inputs are made from them.
    """
    unneeded = set() if _needs_labels(model, inputs) else {"labels"}
    unneeded |= {"start_positions", "end_positions"}
    outputs = run_inside(model, {name: value for name, value in inputs.items() if name not in unneeded})
    if has_spans(inputs):
        return span_logits(outputs)
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]


def _needs_labels(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Tell whether the inputs of a decoder are made from the labels."""
    has_decoder_inputs = "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs
    return is_encoder_decoder(model) and not has_decoder_inputs


def confined_to(head: nn.Linear, tokens_C: Tensor) -> AbstractContextManager[None]:
    """Let a language-model head make the logits of some tokens only inside the `with`."""

    def forward(hidden: Tensor) -> Tensor:
        return F.linear(hidden, head.weight[tokens_C], None if head.bias is None else head.bias[tokens_C])

    return replaced_forward(head, forward)
