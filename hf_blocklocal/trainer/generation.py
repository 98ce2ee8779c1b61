"""Refuse, before training, to generate texts in a way that a model does not support: else the first evaluation would.

It reads configurations, and knows nothing of blocks.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_blocklocal.errors import UnsupportedSettingError


# What a configuration may call the number of positions that a decoder has embeddings for.
_POSITIONS = ("max_target_positions", "max_position_embeddings", "n_positions")
# Models that name such a number but bias attention by distance, and so know no longest text.
_WITHOUT_POSITIONS = ("t5", "mt5", "umt5", "longt5", "switch_transformers")
_TOKENS = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")


def check_generation(model: nn.Module, *, max_length: int | None, num_beams: int | None) -> None:
    """Refuse a generation config, or what overrides it, that cannot work with a model.

    Args:
        model: The model that is to generate.
        max_length: Longest text, in place of what the generation config says.
        num_beams: Beams, in place of what the generation config says.

    Raises:
        UnsupportedSettingError: If the model cannot generate, or not like that.
    """
    name = type(model).__name__
    config = getattr(model, "generation_config", None)
    if not (hasattr(model, "can_generate") and model.can_generate()) or config is None:
        raise UnsupportedSettingError(
            f"predict_with_generate=True needs a model that generates, and {name} does not. Load it by "
            "AutoModelForSeq2SeqLM, or set predict_with_generate=False."
        )
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise UnsupportedSettingError(
            f"The generation config of {name} contradicts itself. Mend model.generation_config, or pass another as "
            f"generation_config. transformers says: {error}"
        ) from error
    _check_tokens(name, config, model.config)
    for option, value in (("generation_max_length", max_length), ("generation_num_beams", num_beams)):
        if value is not None and value < 1:
            raise UnsupportedSettingError(f"{option}={value} must be at least 1. Leave it out for the model's own.")
    _check_length(name, config, model.config, max_length)


def _check_tokens(name: str, config: Any, model_config: Any) -> None:
    """Refuse tokens that the model has no embedding for, and a decoder that nothing starts."""
    text = model_config.get_text_config(decoder=True)
    size = getattr(text, "vocab_size", None)
    for key in _TOKENS:
        value = getattr(config, key, None)
        ids = value if isinstance(value, list) else [value]
        if wrong := [token for token in ids if isinstance(token, int) and size is not None and not 0 <= token < size]:
            raise UnsupportedSettingError(
                f"The generation config of {name} has {key}={wrong[0]}, and the model knows the tokens 0 to "
                f"{size - 1}. Set model.generation_config.{key} to one of them."
            )
    starts = (getattr(config, key, None) for key in ("decoder_start_token_id", "bos_token_id"))
    if model_config.is_encoder_decoder and all(start is None for start in starts):
        raise UnsupportedSettingError(
            f"The generation config of {name} names no token that a text starts with. Set "
            "model.generation_config.decoder_start_token_id, as in model.config."
        )


def _check_length(name: str, config: Any, model_config: Any, max_length: int | None) -> None:
    """Refuse texts that are longer than the decoder has positions for."""
    text = model_config.get_text_config(decoder=True)
    known = (getattr(text, key, None) for key in _POSITIONS)
    positions = next((number for number in known if isinstance(number, int)), None)
    if positions is None or model_config.model_type in _WITHOUT_POSITIONS:
        return
    asked = {"generation_max_length": max_length}
    if max_length is None:
        asked = {f"generation_config.{key}": getattr(config, key, None) for key in ("max_new_tokens", "max_length")}
    for option, value in asked.items():
        if value is not None and value > positions:
            raise UnsupportedSettingError(
                f"{option}={value} is longer than the {positions} positions that {name} has. Set it to {positions} "
                "or less."
            )
