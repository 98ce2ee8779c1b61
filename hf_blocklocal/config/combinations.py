"""Fields of a configuration that exclude each other.

Each is possible by itself; what is wrong with one alone the configuration checks before.
"""

from __future__ import annotations

from typing import Any

from hf_blocklocal.errors import ConfigError


def check_combinations(config: Any) -> None:
    """Refuse fields that contradict each other.

    Args:
        config: A `BlockLocalConfig` whose fields are possible one by one.

    Raises:
        ConfigError: For the first pair that is found.
    """
    _check_borrowing(config)
    _check_head(config)
    _check_refresh(config)
    _check_bootstrap(config)
    _check_parallel(config)


def _check_head(config: Any) -> None:
    if config.chunked_loss is not None and config.num_blocks == 1:
        raise ConfigError(
            f"chunked_loss={config.chunked_loss} is for the last of several blocks, and num_blocks=1 is the plain "
            "Trainer. Use more blocks, or a fused loss of the model, such as use_liger_kernel=True."
        )
    if config.feedback == "chained" and config.latent_dim < 2:
        raise ConfigError(
            f"latent_dim={config.latent_dim} and feedback='chained' exclude each other: a message of one unit is "
            "nothing but its scale, and that is lost on the way down. Use a latent_dim of at least 2."
        )
    if config.satisfied_at is not None and config.feedback == "prototype":
        raise ConfigError(
            f"satisfied_at={config.satisfied_at} and feedback='prototype' exclude each other: one masks targets one "
            "by one, the other compares all of them. Leave one of the two out."
        )
    if config.satisfied_at is not None and config.sim > 0:
        raise ConfigError(
            f"satisfied_at={config.satisfied_at} and sim={config.sim} exclude each other: one masks targets one by "
            "one, the other compares all of them. Leave one of the two out."
        )


def _check_borrowing(config: Any) -> None:
    if config.head_bypass == "straight_through":
        _check_straight_through(config)
    if not config.borrows:
        return
    borrowing = f"head_layers={config.head_layers}" if config.head_layers else "head_lens=True"
    if config.feedback in ("direct", "chained", "prototype"):
        raise ConfigError(
            f"{borrowing} and feedback={config.feedback!r} exclude each other: a head that borrows layers predicts "
            "with the model's own task head. Use feedback='auto'."
        )
    if config.sim > 0:
        raise ConfigError(
            f"{borrowing} and sim={config.sim} exclude each other: similarity matching compares a block's own output. "
            "Leave one of the two out."
        )
    if config.readout != "linear":
        raise ConfigError(
            f"{borrowing} and readout={config.readout!r} exclude each other: a head that borrows layers has no "
            "readout. Leave one of the two out."
        )


def _check_straight_through(config: Any) -> None:
    if config.head_layers == 0:
        raise ConfigError(
            "head_bypass='straight_through' and head_layers=0 exclude each other: gradients go straight past the "
            "layers that a head does not borrow, and here they would meet none. Use head_layers=1 or more, or leave "
            "head_bypass out."
        )
    if config.blocks_apart:
        raise ConfigError(
            f"head_bypass='straight_through' and {config.apart_by} exclude each other: the head of a block runs all "
            "layers above it, and no place has room for those of the others. Use head_bypass='skip'."
        )


def _check_refresh(config: Any) -> None:
    fields = ("head_refresh_lag", "head_refresh_decay")
    idle = [f"{name}={getattr(config, name)}" for name in fields if getattr(config, name)]
    if config.head_refresh_steps == 0 and idle:
        raise ConfigError(
            "head_refresh_steps=0 takes no other copies than those that training begins with, so "
            f"{' and '.join(idle)} would have nothing to act on. Leave that out, or set head_refresh_steps."
        )


def _check_bootstrap(config: Any) -> None:
    if config.bootstrap == 0:
        return
    needs = {
        "feedback": ("auto", "chained", "direct"),
        "readout": ("linear",),
        "head_layers": (None, 0),
        "head_lens": (False,),
    }
    for name, possible in {**needs, "overlap": (0,)}.items():
        value = getattr(config, name)
        if value not in possible:
            raise ConfigError(
                f"bootstrap={config.bootstrap} and {name}={value!r} exclude each other: the message of a learned "
                "feedback network is carried into what a block hands on through its linear readout, without "
                f"gradient. Use {name}={possible[-1]!r}, or leave bootstrap out."
            )


def _check_parallel(config: Any) -> None:
    size = config.block_parallel_size
    if size not in (1, config.num_blocks):
        raise ConfigError(
            f"block_parallel_size={size} and num_blocks={config.num_blocks} do not go together: every block gets a "
            f"process of its own. Use block_parallel_size={config.num_blocks}, or 1 for all blocks in one process."
        )
    if config.placement == "devices" and (size > 1 or config.num_blocks == 1):
        other, reason = (
            (f"block_parallel_size={size}", "a process has one block, on one device")
            if size > 1
            else ("num_blocks=1", "a single block lies on one device")
        )
        raise ConfigError(f"placement='devices' and {other} exclude each other: {reason}. Leave one of the two out.")
    if config.shard_replicas and size == 1:
        raise ConfigError(
            "shard_replicas=True shares out a block among the processes that hold it, and with block_parallel_size=1 "
            f"a process holds all of them. Use block_parallel_size={config.num_blocks}, or leave shard_replicas out."
        )
    if config.blocks_apart:
        _check_apart(config, config.apart_by)


def _check_apart(config: Any, option: str) -> None:
    alone = {
        "overlap": 0,
        "global_every": None,
        "polish": 0.0,
        "feedback": ("auto", "direct", "label", "prototype"),
    }
    for name, possible in alone.items():
        value = getattr(config, name)
        if value not in (possible if isinstance(possible, tuple) else (possible,)):
            raise ConfigError(
                f"{option} and {name}={value!r} exclude each other: a block in a process or on a device of its own "
                "has neither the gradients nor the feedback networks of the others. Leave one of the two out."
            )
    if config.tied_weights == "add":
        raise ConfigError(
            f"{option} and tied_weights='add' exclude each other: the gradients of a weight that is used in several "
            "processes, or on several devices, are nowhere together. Use tied_weights='untie' or 'freeze'."
        )
    if config.placement == "devices" and config.denoising > 0:
        raise ConfigError(
            f"placement='devices' and denoising={config.denoising} exclude each other: the second run of a block goes "
            "through the whole model, and so over all devices. Leave one of the two out."
        )
