"""What becomes of a weight that several blocks use, such as an embedding that is also the language-model head."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from hf_blocklocal.anatomy.embeddings import input_embedding, output_embedding
from hf_blocklocal.anatomy.layers import is_encoder_decoder
from hf_blocklocal.config.block_local import BlockLocalConfig
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
        if config.blocks_apart:
            policy = "freeze" if _is_frozen(model) or not untie_(model, asked=False) else "untie"
    elif policy == "untie":
        untie_(model, asked=True)
    return replace(config, tied_weights=policy) if config.tied_weights != policy else config


def _is_frozen(model: nn.Module) -> bool:
    """Tell whether the language-model head shares its weight and nobody trains it, as under adapters."""
    return _is_tied(model) and not output_embedding(model).weight.requires_grad


def _is_tied(model: nn.Module) -> bool:
    source, head = input_embedding(model), output_embedding(model)
    return source is not None and head is not None and source.weight is head.weight


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
    if not _is_tied(model):
        return True
    head = output_embedding(model)
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


def with_shared_weights_settled_(
    model: nn.Module, config: BlockLocalConfig, reach: Sequence[set[str]], *, asked: bool
) -> BlockLocalConfig:
    """Decide what becomes of weights that are still shared by blocks, and freeze them if that is it.

    Args:
        model: The model, changed in place.
        config: What has been decided of the language-model head.
        reach: For each block, the names of the parameters that its loss reaches.
        asked: Whether `untie` was asked for by name.

    Returns:
        The configuration with nothing left open about them.

    Raises:
        UnsupportedSettingError: If untying was asked for, blocks are apart, and other weights than the
            language-model head's are shared.
    """
    shared = _learned(model, shared_by_blocks(reach))
    policy = config.tied_weights
    if policy == "untie" and config.blocks_apart and shared:
        if asked:
            raise UnsupportedSettingError(
                f"tied_weights='untie' and {config.apart_by}: {type(model).__name__} "
                f"has other weights than its language-model head that several blocks use, {', '.join(shared[:4])}, "
                "and there is no way to add up their gradients. Use tied_weights='freeze'."
            )
        policy = "freeze"
    if policy == "freeze":
        freeze_shared_(model, reach)
    return replace(config, tied_weights=policy) if config.tied_weights != policy else config


def freeze_shared_(model: nn.Module, reach: Sequence[set[str]]) -> None:
    """Freeze the parameters that the losses of several blocks reach.

    Args:
        model: The model, changed in place.
        reach: For each block, the names of the parameters that its loss reaches.
    """
    shared = _learned(model, shared_by_blocks(reach))
    for name in shared:
        model.get_parameter(name).requires_grad_(False)
    if shared:
        logger.warning(
            "%s: used by several blocks, and frozen: tied_weights='freeze'. It stays as it was pretrained.",
            ", ".join(shared),
        )


def _learned(model: nn.Module, names: Sequence[str]) -> list[str]:
    return [name for name in names if model.get_parameter(name).requires_grad]


def shared_by_blocks(reach: Sequence[set[str]]) -> list[str]:
    """Return the names of the parameters that the losses of several blocks reach."""
    seen: set[str] = set()
    return sorted({name for names in reach for name in names if name in seen or seen.add(name)})
