"""A batch made up from a model alone, for what only takes its shapes: which heads fit, where it can be cut.

It knows a model by its config and the name of its class. Models of sound, and tasks of their own, need a real batch.
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn

from hf_blocklocal.errors import InputsNeededError


# Shapes: B samples, S positions.
_SAMPLES, _POSITIONS = 2, 4
_WHOLE = ("ForSequenceClassification", "ForImageClassification")
_EACH_TOKEN = ("ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "LMHeadModel")


def stand_in(model: nn.Module) -> dict[str, Tensor]:
    """Make up a batch with labels.

    Args:
        model: A transformers model with a task head.

    Raises:
        InputsNeededError: If its inputs or its task are not known well enough.
    """
    device = next(model.parameters()).device
    inputs = _inputs(model)
    inputs["labels"] = _labels(model, inputs)
    return {name: value.to(device) for name, value in inputs.items()}


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    config, name = model.config, model.main_input_name
    if name == "input_ids":
        special = {value for key, value in config.to_dict().items() if key.endswith("_token_id")}
        words = islice((word for word in range(config.vocab_size) if word not in special), _SAMPLES * _POSITIONS)
        ids_BS = torch.tensor(list(words)).reshape(_SAMPLES, _POSITIONS)
        return {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
    if name == "pixel_values" and hasattr(config, "image_size"):
        side = config.image_size
        height, width = (side, side) if isinstance(side, int) else side
        return {name: torch.zeros(_SAMPLES, getattr(config, "num_channels", 3), height, width)}
    raise _unknown(model, f"its input {name}")


def _labels(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    kind, config = type(model).__name__, model.config
    if kind.endswith(_WHOLE):
        problem = getattr(config, "problem_type", None)
        if problem == "multi_label_classification" or (problem == "regression" and config.num_labels > 1):
            return torch.zeros(_SAMPLES, config.num_labels)
        is_number = problem == "regression" or (problem is None and config.num_labels == 1)
        return torch.zeros(_SAMPLES) if is_number else torch.zeros(_SAMPLES, dtype=torch.long)
    if kind.endswith("ForTokenClassification"):
        return torch.zeros_like(inputs["input_ids"])
    if kind.endswith(_EACH_TOKEN) and "input_ids" in inputs:
        return inputs["input_ids"].clone()
    raise _unknown(model, "its task")


def _unknown(model: nn.Module, what: str) -> InputsNeededError:
    return InputsNeededError(
        f"No batch can be made up for {type(model).__name__}, because {what} is not known. Hand in a small batch with "
        "labels as `inputs`."
    )
