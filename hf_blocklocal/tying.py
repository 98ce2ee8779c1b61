"""What becomes of a weight that several blocks use, such as an embedding that is also the language-model head."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from hf_blocklocal.anatomy import input_embedding, is_encoder_decoder, output_embedding
from hf_blocklocal.config import BlockLocalConfig
from hf_blocklocal.errors import UnsupportedSettingError


logger = logging.getLogger(__name__)


def with_tied_weights_settled_(model: nn.Module, config: BlockLocalConfig) -> BlockLocalConfig:
    """Decide what becomes of shared weights, and untie them if that is it.

    Args:
        model: The model, changed in place.
        config: What was asked for.

    Returns:
        The configuration with nothing left open about it.
    """
    policy = config.tied_weights
    if policy == "auto":
        policy = "add"
        if config.block_parallel_size > 1:
            policy = "untie" if untie_(model, asked=False) else "freeze"
    elif policy == "untie":
        untie_(model, asked=True)
    return replace(config, tied_weights=policy) if config.tied_weights != policy else config


def untie_(model: nn.Module, *, asked: bool) -> bool:
    """Give the language-model head a weight of its own, equal to the input embedding's, if it has none.

    Args:
        model: The model, changed in place; its config says that nothing is tied, so that it is loaded like that.
        asked: Whether to refuse, where it cannot be done, rather than to leave the model as it is.

    Returns:
        Whether no weight is shared between the two afterwards.

    Raises:
        UnsupportedSettingError: If it was asked for and cannot be done.
    """
    source, head = input_embedding(model), output_embedding(model)
    if source is None or head is None or source.weight is not head.weight:
        return True
    if is_encoder_decoder(model):
        if asked:
            raise UnsupportedSettingError(
                f"tied_weights='untie' is not possible for {type(model).__name__}: encoder, decoder and language "
                "model head share one weight, and its forward pass depends on that. Use tied_weights='freeze'."
            )
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    for part in model.modules():
        if hasattr(part, "all_tied_weights_keys"):
            part.all_tied_weights_keys = {}
    name = next(name for name, parameter in model.named_parameters() if parameter is head.weight)
    logger.warning(
        "%s is untied from the input embedding, since the two lie in different blocks: the model has %s parameters "
        "more, and is saved with tie_word_embeddings=False. tied_weights='freeze' keeps it tied.",
        name,
        f"{head.weight.numel():,}",
    )
    return True


def freeze_shared_(model: nn.Module, reach: Sequence[set[str]]) -> list[str]:
    """Freeze the parameters that the losses of several blocks reach.

    Args:
        model: The model, changed in place.
        reach: For each block, the names of the parameters that its loss reaches.

    Returns:
        Their names.
    """
    seen: set[str] = set()
    shared = sorted(name for names in reach for name in names if name in seen or seen.add(name))
    for name in dict.fromkeys(shared):
        model.get_parameter(name).requires_grad_(False)
    if shared:
        logger.warning(
            "%s: used by several blocks, and frozen: tied_weights='freeze'. It stays as it was pretrained.",
            ", ".join(dict.fromkeys(shared)),
        )
    return list(dict.fromkeys(shared))
