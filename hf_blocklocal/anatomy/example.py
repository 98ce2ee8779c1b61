"""Make up a small batch that a model can run, from what its config says.

For whoever has a trained model and no data at hand. The batch means nothing: it is good for tracing and for comparing
two models with each other.
"""

# Shapes: B batch, S sequence.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_blocklocal.anatomy.embeddings import vocabulary_size
from hf_blocklocal.anatomy.layers import is_encoder_decoder
from hf_blocklocal.anatomy.modes import evaluation_mode
from hf_blocklocal.errors import InputsNeededError
from hf_blocklocal.targets.spans import span_logits


SAMPLES, TOKENS, WAVE = 2, 8, 3200


def example_batch(model: nn.Module) -> dict[str, Tensor]:
    """Return inputs with labels, the same each time, on the device of the model.

    Args:
        model: A transformers model with a task head.

    Raises:
        InputsNeededError: If it is not known what the model takes, or it has no task head.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = _inputs(model, generator)
    if is_encoder_decoder(model) and vocabulary_size(model) is not None:
        inputs["labels"] = _tokens(model, TOKENS - 2, generator)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    return inputs if "labels" in inputs else {**inputs, **_labels(model, inputs)}


def _inputs(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    config, name = model.config, model.main_input_name
    if name == "input_ids":
        input_ids = _tokens(model, TOKENS, generator)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    shape: tuple[int, ...] | None = None
    if name == "pixel_values" and hasattr(config, "image_size"):
        side = config.image_size
        sides = (side, side) if isinstance(side, int) else tuple(side)
        shape = (getattr(config, "num_channels", 3), *sides)
    elif name == "input_features" and hasattr(config, "max_source_positions"):
        shape = (config.num_mel_bins, 2 * config.max_source_positions)
    elif name == "input_values" and hasattr(config, "conv_stride"):
        shape = (WAVE,)
    if shape is None:
        raise _unknown(model, f"its input {name}")
    return {name: torch.randn((SAMPLES, *shape), generator=generator).to(model.dtype)}


def _tokens(model: nn.Module, length: int, generator: torch.Generator) -> Tensor:
    """Draw ordinary tokens, each text ended by the end token where there is one."""
    config = model.config.get_text_config()
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    given: list[Any] = [getattr(config, name, None) for name in names]
    special = {token for token in given if isinstance(token, int)}
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ordinary = torch.tensor([token for token in range(min(vocabulary, 1000)) if token not in special])
    tokens_BS = ordinary[torch.randint(len(ordinary), (SAMPLES, length), generator=generator)]
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < vocabulary and end != getattr(config, "pad_token_id", None):
        tokens_BS[:, -1] = end
    return tokens_BS


@torch.no_grad()
def _labels(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make labels of the form that the model's logits ask for."""
    with evaluation_mode(model):
        outputs = model(**inputs)
    if span_logits(outputs) is not None:
        starts_B = torch.zeros(SAMPLES, dtype=torch.long, device=model.device)
        return {"start_positions": starts_B, "end_positions": starts_B + TOKENS // 2}
    if not isinstance(getattr(outputs, "logits", None), Tensor):
        raise _unknown(model, "its task")
    return {"labels": _labels_like(outputs.logits, getattr(model.config, "problem_type", None))}


def _labels_like(logits: Tensor, problem: str | None) -> Tensor:
    if logits.dim() == 3:
        return torch.ones(logits.shape[:2], dtype=torch.long, device=logits.device)
    if problem == "multi_label_classification":
        return torch.ones_like(logits, dtype=torch.float32)
    if problem == "regression" or (problem is None and logits.shape[-1] == 1):
        return torch.ones_like(logits, dtype=torch.float32).squeeze(-1)
    return torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)


def _unknown(model: nn.Module, what: str) -> InputsNeededError:
    return InputsNeededError(
        f"No batch can be made up for {type(model).__name__}, because {what} is not known. Hand in a small batch with "
        "labels: inputs=batch."
    )
