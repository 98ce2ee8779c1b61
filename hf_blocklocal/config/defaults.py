"""Fill in what a configuration leaves to the model: how many layers its heads borrow and how, and learning rates.

Knows nothing of heads. What speaks against borrowing is that a user asked for a head of another kind, or that the
model cannot lend. Encoder-decoders are a case of their own: through a shortened decoder that has not learned to be
one, encoders learned worse than from heads of their own. So heads run the whole decoder where it is, and train a
shortened copy of it where it is not.
"""

from __future__ import annotations

from dataclasses import replace

from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.errors import ConfigError


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
# Copies that learn keep half of what they have learned. Those of a decoder keep all: they have learned to do without
# the layers between them, and what a refresh would bring has not.
REFRESH_DECAY = 0.5
# Learning rate of the lowest block of a pretrained model, as a share of the last one's. In the learning benchmark
# (docs/learning.md) it was better than one rate on text and the language model, by far, and a little worse on images.
LOWEST_RATE = 0.3
_COPIES = ("head_copies", "head_refresh_steps", "head_refresh_lag", "head_refresh_decay")


def default_head_layers(num_blocks: int, *, shortens_decoder: bool = False) -> int:
    """Return how many layers heads borrow by default: one where the model is cut in two, else two.

    In the learning benchmark (docs/learning.md), with one learning rate for all blocks, one layer in two blocks came
    within 1.1 % of backpropagation's perplexity and to its accuracy on images, and two layers in four within 2.8 %.

    Args:
        num_blocks: Blocks.
        shortens_decoder: Whether heads train a shortened copy of a decoder, for which one layer is too few.
    """
    return 2 if shortens_decoder else min(num_blocks - 1, 2)


def default_refresh_lag(num_blocks: int) -> int:
    """Return by how many steps copies are late by default, where blocks are apart.

    A forward pass is a third of a step, so the first block is ahead of the last by a third of a step for every block
    between them. A longer lag would let it run further ahead, and what heads borrow would be older: in the learning
    benchmark (docs/learning.md) that costs the more, the less copies learn by themselves.
    """
    return 1 + (num_blocks - 1) // 3


def default_decay(num_blocks: int) -> float:
    """Return by what factor blocks of a pretrained model learn more slowly than the ones above them by default."""
    return round(LOWEST_RATE ** (1 / (num_blocks - 1)), 3)


def settled(
    config: BlockLocalConfig, *, single_stack: bool, lends: bool = True, pretrained: bool = False
) -> BlockLocalConfig:
    """Return a configuration that leaves nothing about its heads and its learning rates open.

    Args:
        config: What was asked for.
        single_stack: Whether the model has one stack of layers.
        lends: Whether its layers can be borrowed; see `teaching.building.can_lend`.
        pretrained: Whether its weights come from a checkpoint.

    Raises:
        ConfigError: If heads are to be of two kinds, or to train copies of layers that they do not borrow.
    """
    if config.num_blocks == 1:
        return config
    if config.block_lr_decay is None:
        config = replace(config, block_lr_decay=default_decay(config.num_blocks) if pretrained else 1.0)
    if config.head_layers is None:
        _check_heads_of_one_kind(config)
        shortens = not single_stack and config.head_bypass != "straight_through" and _takes_copies(config)
        layers = default_head_layers(config.num_blocks, shortens_decoder=shortens)
        config = replace(config, head_layers=layers if _may_borrow(config, lends=lends) else 0)
    if config.head_bypass == "auto":
        runs_all = config.head_layers > 0 and not single_stack and not _takes_copies(config)
        config = replace(config, head_bypass="straight_through" if runs_all else "skip")
    if not config.borrows:
        _check_nothing_is_trained(config, lends=lends)
        return replace(config)  # which settles the number of blocks, too
    return replace(refreshed(config, single_stack=single_stack))


def _takes_copies(config: BlockLocalConfig) -> bool:
    return config.blocks_apart or not config.is_live


def _check_nothing_is_trained(config: BlockLocalConfig, *, lends: bool) -> None:
    if config.head_copies == "trained":
        asked = _own_head_field(config)
        reason = "this model cannot lend layers" if not lends else "head_layers=0"
        if asked is not None:
            reason = f"{asked}={getattr(config, asked)!r} asks for heads of their own"
        raise ConfigError(
            f"head_copies='trained' is for heads that borrow layers, and here they borrow none: {reason}. Leave "
            "head_copies out, or let heads borrow layers."
        )


def _own_head_field(config: BlockLocalConfig) -> str | None:
    """Return the first field that asks for heads with parameters of their own, if any does."""
    return next((name for name in OWN_HEAD if getattr(config, name) != getattr(BlockLocalConfig, name)), None)


def _may_borrow(config: BlockLocalConfig, *, lends: bool) -> bool:
    """Tell whether heads are to borrow layers if nobody says how many."""
    return config.head_bypass == "straight_through" or (_own_head_field(config) is None and lends)


def _check_heads_of_one_kind(config: BlockLocalConfig) -> None:
    asked = _own_head_field(config)
    if config.head_bypass == "straight_through" and asked is not None:
        raise ConfigError(
            f"head_bypass='straight_through' and {asked}={getattr(config, asked)!r} exclude each other: one is "
            "for heads that borrow layers, the other asks for heads of their own. Leave one of the two out."
        )


def borrowing_as(config: BlockLocalConfig, saved: BlockLocalConfig) -> BlockLocalConfig:
    """Return a configuration whose heads borrow copies as those of an earlier run, in all that it leaves open.

    Args:
        config: What was asked for.
        saved: The configuration of a checkpoint, with nothing left open.
    """

    def left_open(*names: str) -> list[str]:
        return [name for name in names if getattr(config, name) == getattr(BlockLocalConfig, name)]

    of_copies = left_open(*_COPIES)
    if config.blocks_apart or saved.is_live or config.num_blocks != saved.num_blocks or len(of_copies) < len(_COPIES):
        return config
    names = left_open(*_COPIES, "head_layers", "head_bypass", "tied_weights")
    return replace(config, **{name: getattr(saved, name) for name in names})


def learning_as(config: BlockLocalConfig, saved: BlockLocalConfig) -> BlockLocalConfig:
    """Return a configuration whose blocks learn at the rates of an earlier run, if it leaves them open.

    Args:
        config: What was asked for.
        saved: The configuration of a checkpoint, with nothing left open.
    """
    is_open = config.block_lr_decay is None and config.num_blocks == saved.num_blocks and not config.blocks_apart
    return replace(config, block_lr_decay=saved.block_lr_decay) if is_open else config


def refreshed(config: BlockLocalConfig, *, single_stack: bool = True) -> BlockLocalConfig:
    """Return a configuration that leaves nothing about copies open: late ones, where blocks are on several devices.

    Args:
        config: What was asked for, by someone whose heads use something of later blocks.
        single_stack: Whether the model has one stack of layers.
    """
    if not _takes_copies(config):
        return config
    kind = config.head_copies
    if kind == "auto":
        kind = "trained" if config.borrows else "frozen"
    shortens_decoder = not single_stack and config.head_bypass == "skip"
    every, lag, decay = config.head_refresh_steps, config.head_refresh_lag, config.head_refresh_decay
    if every is None:
        every = 0 if kind == "trained" and shortens_decoder else REFRESH_STEPS
    if lag is None:
        lag = default_refresh_lag(config.num_blocks) if every > 0 else 0
    if decay is None:
        decay = REFRESH_DECAY if kind == "trained" and every > 0 else 0.0
    return replace(config, head_copies=kind, head_refresh_steps=every, head_refresh_lag=lag, head_refresh_decay=decay)
