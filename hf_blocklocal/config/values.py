"""Values of a configuration that are impossible by themselves, and those that are brought into one form."""

from __future__ import annotations

import math
from typing import Any, get_args, get_type_hints

from hf_blocklocal.errors import ConfigError


def check_values(config: Any) -> None:
    """Refuse values that no other value could make possible.

    Args:
        config: A `BlockLocalConfig` under construction. Numbers become floats where fractions are possible.

    Raises:
        ConfigError: For the first such value.
    """
    _check_choices(config)
    _check_numbers(config)
    _check_weights(config)
    _check_shares(config)
    _check_decay(config)


def _check_choices(config: Any) -> None:
    for name, hint in get_type_hints(type(config)).items():
        choices = get_args(hint)
        value = getattr(config, name)
        if choices and all(isinstance(choice, str) for choice in choices) and value not in choices:
            raise ConfigError(f"{name}={value!r} is not known. Choose one of {list(choices)}.")


def _check_numbers(config: Any) -> None:
    positive = dict.fromkeys(
        ("num_blocks", "latent_dim", "negatives", "global_every", "block_parallel_size", "chunked_loss"), 1
    )
    others = dict.fromkeys(
        ("head_layers", "head_refresh_steps", "head_refresh_lag", "overlap", "head_warmup_steps"), 0
    )
    for name, least in {**positive, **others}.items():
        value = getattr(config, name)
        if value is None and get_type_hints(type(config))[name] == int | None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def check_types(config: Any) -> None:
    """Refuse values of another kind than their field.

    Raises:
        ConfigError: For the first such value.
    """
    for name in ("step_per_block", "evaluate_blocks", "head_lens", "save_on_exit", "shard_replicas"):
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name} must be true or false, got {getattr(config, name)!r}.")
    for name, kind, what in (("boundaries", int, "whole numbers"), ("layers", str, "dotted names")):
        value = getattr(config, name)
        fits = isinstance(value, tuple) and all(type(item) is kind for item in value)
        if value is not None and (not fits or (name == "layers" and not value)):
            raise ConfigError(f"{name} must be a list of {what}, or left out; got {value!r}.")


def _check_weights(config: Any) -> None:
    for name in ("anchor", "denoising", "reconstruction"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ConfigError(f"{name} must be a number of at least 0, got {value!r}.")
        object.__setattr__(config, name, float(value))


def _check_shares(config: Any) -> None:
    timeout = config.peer_timeout
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 3 <= timeout < math.inf:
        raise ConfigError(f"peer_timeout must be a number of seconds of at least 3, got {timeout!r}.")
    object.__setattr__(config, "peer_timeout", float(timeout))
    decay = config.block_lr_decay
    if decay is not None:
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 < decay <= 1:
            raise ConfigError(f"block_lr_decay must be a number above 0 and at most 1, or left out; got {decay!r}.")
        object.__setattr__(config, "block_lr_decay", float(decay))
    for name in ("polish", "sim", "bootstrap"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(f"{name} must be a share between 0 and 1, got {value!r}.")
        object.__setattr__(config, name, float(value))
    until = config.bootstrap_until
    if isinstance(until, bool) or not isinstance(until, int | float) or not 0 < until < 1:
        raise ConfigError(
            f"bootstrap_until must be a share above 0 and below 1, so that it ends before the run; got {until!r}."
        )
    rate = config.feedback_learning_rate
    if rate is not None:
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise ConfigError(f"feedback_learning_rate must be a number above 0, or left out; got {rate!r}.")
        object.__setattr__(config, "feedback_learning_rate", float(rate))
    margin = config.satisfied_at
    is_number = isinstance(margin, int | float) and not isinstance(margin, bool)
    if margin is not None and not (is_number and 0 < margin < 1):
        raise ConfigError(f"satisfied_at must be a probability between 0 and 1, or left out; got {margin!r}.")


def _check_decay(config: Any) -> None:
    decay = config.head_refresh_decay
    if decay is None:
        return
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
        raise ConfigError(f"head_refresh_decay must be a number of at least 0 and below 1, got {decay!r}.")
    object.__setattr__(config, "head_refresh_decay", float(decay))
