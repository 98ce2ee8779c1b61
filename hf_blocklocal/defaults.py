"""Fill in what a configuration leaves to the model: how many layers its heads borrow.

Knows nothing of heads. What speaks against borrowing is that a user asked for a head of another kind, or that an
encoder and a decoder are in different places: through a shortened decoder, encoders learned worse than from heads of
their own, and a decoder that runs whole has to be where the encoder is.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Literal

from hf_blocklocal.config import BlockLocalConfig
from hf_blocklocal.errors import ConfigError


logger = logging.getLogger(__name__)

# Fields that speak of a head with parameters of its own; any that is not as it comes turns borrowing off.
OWN_HEAD = (
    "feedback",
    "loss",
    "family",
    "latent_dim",
    "readout",
    "pooling",
    "sim",
    "feedback_learning_rate",
    "bootstrap",
)

# Where blocks are apart, nothing can be borrowed live without waiting for it.
REFRESH_STEPS = 10
# Copies that learn keep half of what they have learned: all that is new in a late one they lack, and it is older.
REFRESH_DECAY = 0.5


def default_head_layers(num_blocks: int) -> int:
    """Return how many layers heads borrow by default: one where the model is cut in two, else two.

    In the learning benchmark (docs/learning.md), one layer in two blocks came within 1.1 % of
    backpropagation's perplexity and above its accuracy on images, and two layers in four blocks within 2.8 %.
    """
    return min(num_blocks - 1, 2)


def default_refresh_lag(num_blocks: int) -> int:
    """Return by how many steps copies are late by default, where blocks are apart.

    A forward pass is a third of a step, so the first block is ahead of the last by a third of a step for every block
    between them. A longer lag would let it run further ahead, and what heads borrow would be older: in the learning
    benchmark (docs/learning.md) that costs more than anything else that processes of their own do.
    """
    return 1 + (num_blocks - 1) // 3


def settled(config: BlockLocalConfig, *, single_stack: bool, lends: bool = True) -> BlockLocalConfig:
    """Return a configuration that leaves nothing about its heads open.

    Args:
        config: What was asked for.
        single_stack: Whether the model has one stack of layers.
        lends: Whether its layers can be borrowed; see `building.can_lend`.

    Raises:
        ConfigError: If heads are to be of two kinds.
    """
    if config.num_blocks == 1:
        return config
    if config.head_layers is None:
        _check_heads_of_one_kind(config)
        reason = _reason_for_own_heads(config, single_stack=single_stack, lends=lends)
        if reason == "decoder apart":
            _warn_of_encoder(config)
        config = replace(config, head_layers=default_head_layers(config.num_blocks) if reason is None else 0)
    if config.head_bypass == "auto":
        runs_all = config.head_layers > 0 and not single_stack and not config.blocks_apart
        config = replace(config, head_bypass="straight_through" if runs_all else "skip")
    return refreshed(config) if config.borrows else config


def _own_head_field(config: BlockLocalConfig) -> str | None:
    """Return the first field that asks for heads with parameters of their own, if any does."""
    return next((name for name in OWN_HEAD if getattr(config, name) != getattr(BlockLocalConfig, name)), None)


def _reason_for_own_heads(
    config: BlockLocalConfig, *, single_stack: bool, lends: bool
) -> Literal["asked for", "cannot lend", "decoder apart"] | None:
    """Return why heads have parameters of their own, or nothing if they borrow layers."""
    if config.head_bypass == "straight_through":
        return None
    if _own_head_field(config) is not None:
        return "asked for"
    if not lends:
        return "cannot lend"
    return None if single_stack or not config.blocks_apart else "decoder apart"


def _check_heads_of_one_kind(config: BlockLocalConfig) -> None:
    asked = _own_head_field(config)
    if config.head_bypass == "straight_through" and asked is not None:
        raise ConfigError(
            f"head_bypass='straight_through' and {asked}={getattr(config, asked)!r} exclude each other: one is "
            "for heads that borrow layers, the other asks for heads of their own. Leave one of the two out."
        )


def _warn_of_encoder(config: BlockLocalConfig) -> None:
    logger.warning(
        "With %s, the blocks of an encoder-decoder learn from heads of their own. With those, a pretrained "
        "encoder has come out worse than frozen (docs/learning.md): freeze it, or keep all blocks in one "
        "process and on one device.",
        config.apart_by,
    )


def refreshed(config: BlockLocalConfig) -> BlockLocalConfig:
    """Return a configuration that leaves nothing about copies open: late ones, where blocks are on several devices.

    Args:
        config: What was asked for, by someone whose heads use something of later blocks.
    """
    if config.is_live and not config.blocks_apart:
        return config
    if config.head_copies == "auto":
        config = replace(config, head_copies="trained" if config.borrows else "frozen")
    if (config.head_refresh_steps, config.head_refresh_lag, config.head_refresh_decay) != (1, 0, 0):
        return config
    return replace(
        config,
        head_refresh_steps=REFRESH_STEPS,
        head_refresh_lag=default_refresh_lag(config.num_blocks),
        head_refresh_decay=REFRESH_DECAY if config.head_copies == "trained" else 0.0,
    )
