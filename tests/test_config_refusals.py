"""A configuration that contradicts itself says what was given, what is possible, and what to do."""

from __future__ import annotations

import math

import pytest

from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.errors import BlockLocalError, ConfigError


REFUSALS = {
    "unknown balance": (
        {"balance": "memory"},
        "balance='memory' is not known. Choose one of ['layers', 'cost'].",
    ),
    "unknown feedback": (
        {"feedback": "hyperspherical"},
        "feedback='hyperspherical' is not known. Choose one of ['auto', 'direct', 'chained', 'label', 'prototype'].",
    ),
    "unknown loss": (
        {"loss": "mse"},
        "loss='mse' is not known. Choose one of ['auto', 'contrast', 'agreement', 'kappel2023'].",
    ),
    "unknown family": (
        {"family": "laplace"},
        "family='laplace' is not known. Choose one of ['auto', 'gaussian', 'bernoulli', 'categorical', 'vmf'].",
    ),
    "unknown readout": (
        {"readout": "deep"},
        "readout='deep' is not known. Choose one of ['linear', 'mlp'].",
    ),
    "a readout where layers are borrowed": (
        {"readout": "mlp", "head_layers": 1},
        "head_layers=1 and readout='mlp' exclude each other: a head that borrows layers has no readout. Leave one of "
        "the two out.",
    ),
    "unknown pooling": (
        {"pooling": "max"},
        "pooling='max' is not known. Choose one of ['mean', 'first', 'last'].",
    ),
    "no block": (
        {"num_blocks": 0},
        "num_blocks must be a whole number of at least 1, got 0.",
    ),
    "half a block": (
        {"num_blocks": 2.5},
        "num_blocks must be a whole number of at least 1, got 2.5.",
    ),
    "a truth value for a number": (
        {"num_blocks": True},
        "num_blocks must be a whole number of at least 1, got True.",
    ),
    "no latent": (
        {"latent_dim": 0},
        "latent_dim must be a whole number of at least 1, got 0.",
    ),
    "a nameless latent": (
        {"latent_dim": None},
        "latent_dim must be a whole number of at least 1, got None.",
    ),
    "no negatives": (
        {"negatives": 0},
        "negatives must be a whole number of at least 1, got 0.",
    ),
    "a warm-up that ended before": (
        {"head_warmup_steps": -1},
        "head_warmup_steps must be a whole number of at least 0, got -1.",
    ),
    "a margin that nothing exceeds": (
        {"satisfied_at": 1.0},
        "satisfied_at must be a probability between 0 and 1, or left out; got 1.0.",
    ),
    "an anchor that pushes": (
        {"anchor": -0.1},
        "anchor must be a number of at least 0, got -0.1.",
    ),
    "no end of reconstruction": (
        {"reconstruction": math.inf},
        "reconstruction must be a number of at least 0, got inf.",
    ),
    "noise that is rewarded": (
        {"denoising": -1},
        "denoising must be a number of at least 0, got -1.",
    ),
    "a global step every zero steps": (
        {"global_every": 0},
        "global_every must be a whole number of at least 1, got 0.",
    ),
    "more polish than there is a run": (
        {"polish": 1.5},
        "polish must be a share between 0 and 1, got 1.5.",
    ),
    "more similarity than there is loss": (
        {"sim": 1.5},
        "sim must be a share between 0 and 1, got 1.5.",
    ),
    "similarity where layers are borrowed": (
        {"sim": 0.5, "head_layers": 1},
        "head_layers=1 and sim=0.5 exclude each other: similarity matching compares a block's own output. Leave one "
        "of the two out.",
    ),
    "a lens where nothing is borrowed": (
        {"feedback": "direct", "head_lens": True},
        "head_lens=True and feedback='direct' exclude each other: a head that borrows layers predicts with the "
        "model's own task head. Use feedback='auto'.",
    ),
    "a lens that is a number": (
        {"head_lens": 1},
        "head_lens must be true or false, got 1.",
    ),
    "as many processes as there are no blocks": (
        {"num_blocks": 4, "block_parallel_size": 2},
        "block_parallel_size=2 and num_blocks=4 do not go together: every block gets a process of its own. Use "
        "block_parallel_size=4, or 1 for all blocks in one process.",
    ),
    "blocks shared out within one process": (
        {"num_blocks": 4, "shard_replicas": True},
        "shard_replicas=True shares out a block among the processes that hold it, and with block_parallel_size=1 a "
        "process holds all of them. Use block_parallel_size=4, or leave shard_replicas out.",
    ),
    "a number of shares": (
        {"shard_replicas": 2},
        "shard_replicas must be true or false, got 2.",
    ),
    "no process": (
        {"block_parallel_size": 0},
        "block_parallel_size must be a whole number of at least 1, got 0.",
    ),
    "overlap between processes": (
        {"num_blocks": 2, "block_parallel_size": 2, "overlap": 1},
        "block_parallel_size=2 and overlap=1 exclude each other: a block in a process or on a device of its own "
        "has neither the gradients nor the feedback networks of the others. Leave one of the two out.",
    ),
    "gradients of different processes": (
        {"num_blocks": 2, "block_parallel_size": 2, "tied_weights": "add"},
        "block_parallel_size=2 and tied_weights='add' exclude each other: the gradients of a weight that is used in "
        "several processes, or on several devices, are nowhere together. Use tied_weights='untie' or 'freeze'.",
    ),
    "no patience": (
        {"peer_timeout": 0},
        "peer_timeout must be a number of seconds of at least 3, got 0.",
    ),
    "a lag behind the start": (
        {"head_layers": 1, "head_refresh_steps": 0, "head_refresh_lag": 2},
        "head_refresh_steps=0 takes no other copies than those that training begins with, so head_refresh_lag=2 would "
        "have nothing to act on. Leave that out, or set head_refresh_steps.",
    ),
    "an average that never moves": (
        {"head_layers": 1, "head_refresh_decay": 1},
        "head_refresh_decay must be a number of at least 0 and below 1, got 1.",
    ),
    "a lag of less than nothing": (
        {"head_layers": 1, "head_refresh_lag": -1},
        "head_refresh_lag must be a whole number of at least 0, got -1.",
    ),
    "prototypes where layers are borrowed": (
        {"feedback": "prototype", "head_layers": 1},
        "head_layers=1 and feedback='prototype' exclude each other: a head that borrows layers predicts with the "
        "model's own task head. Use feedback='auto'.",
    ),
    "a chain where layers are borrowed": (
        {"feedback": "chained", "head_layers": 1},
        "head_layers=1 and feedback='chained' exclude each other: a head that borrows layers predicts with the "
        "model's own task head. Use feedback='auto'.",
    ),
    "a chain without room for a message": (
        {"feedback": "chained", "latent_dim": 1},
        "latent_dim=1 and feedback='chained' exclude each other: a message of one unit is nothing but its scale, and "
        "that is lost on the way down. Use a latent_dim of at least 2.",
    ),
    "prototypes of targets that are masked": (
        {"feedback": "prototype", "satisfied_at": 0.9},
        "satisfied_at=0.9 and feedback='prototype' exclude each other: one masks targets one by one, the other "
        "compares all of them. Leave one of the two out.",
    ),
    "similarity of targets that are masked": (
        {"sim": 0.5, "satisfied_at": 0.9},
        "satisfied_at=0.9 and sim=0.5 exclude each other: one masks targets one by one, the other compares all of "
        "them. Leave one of the two out.",
    ),
    "an overlap with blocks above": (
        {"overlap": -1},
        "overlap must be a whole number of at least 0, got -1.",
    ),
    "a block that never learns": (
        {"block_lr_decay": 0},
        "block_lr_decay must be a number above 0 and at most 1, or left out; got 0.",
    ),
    "learning rates that grow downwards": (
        {"block_lr_decay": 1.5},
        "block_lr_decay must be a number above 0 and at most 1, or left out; got 1.5.",
    ),
    "feedback networks that stand still": (
        {"feedback_learning_rate": 0},
        "feedback_learning_rate must be a number above 0, or left out; got 0.",
    ),
    "posteriors of a target that is observed": (
        {"bootstrap": 0.5, "feedback": "label"},
        "bootstrap=0.5 and feedback='label' exclude each other: the message of a learned feedback network is carried "
        "into what a block hands on through its linear readout, without gradient. Use feedback='direct', or leave "
        "bootstrap out.",
    ),
    "posteriors through a hidden layer": (
        {"bootstrap": 0.5, "readout": "mlp"},
        "bootstrap=0.5 and readout='mlp' exclude each other: the message of a learned feedback network is carried "
        "into what a block hands on through its linear readout, without gradient. Use readout='linear', or leave "
        "bootstrap out.",
    ),
    "posteriors where layers are borrowed": (
        {"bootstrap": 0.5, "head_layers": 1},
        "bootstrap=0.5 and head_layers=1 exclude each other: the message of a learned feedback network is carried "
        "into what a block hands on through its linear readout, without gradient. Use head_layers=0, or leave "
        "bootstrap out.",
    ),
    "posteriors that carry gradient": (
        {"bootstrap": 0.5, "overlap": 1},
        "bootstrap=0.5 and overlap=1 exclude each other: the message of a learned feedback network is carried "
        "into what a block hands on through its linear readout, without gradient. Use overlap=0, or leave "
        "bootstrap out.",
    ),
    "more target than there is message": (
        {"bootstrap": 1.5},
        "bootstrap must be a share between 0 and 1, got 1.5.",
    ),
    "a leak that never ends": (
        {"bootstrap_until": 1.0},
        "bootstrap_until must be a share above 0 and below 1, so that it ends before the run; got 1.0.",
    ),
    "two numbers of blocks": (
        {"num_blocks": 2, "boundaries": (1, 2)},
        "num_blocks=2 contradicts boundaries=[1, 2], which make 3 blocks. Leave one of the two out.",
    ),
    "two ways to cut": (
        {"boundaries": (1,), "balance": "cost"},
        "balance='cost' and explicit boundaries exclude each other. Leave one out.",
    ),
    "descending boundaries": (
        {"boundaries": (3, 1)},
        "boundaries=[3, 1] must ascend strictly from at least 1: each is the first layer of a block, and layer 0 "
        "always opens the first one.",
    ),
    "the same boundary twice": (
        {"boundaries": (1, 1)},
        "boundaries=[1, 1] must ascend strictly from at least 1: each is the first layer of a block, and layer 0 "
        "always opens the first one.",
    ),
    "a boundary at the first layer": (
        {"boundaries": (0, 2)},
        "boundaries=[0, 2] must ascend strictly from at least 1: each is the first layer of a block, and layer 0 "
        "always opens the first one.",
    ),
}


@pytest.mark.parametrize(("values", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_config_that_contradicts_itself_says_how(values, message):
    with pytest.raises(ConfigError) as error:
        BlockLocalConfig(**values)
    assert str(error.value) == message


def test_whoever_catches_value_errors_catches_this_one():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, BlockLocalError)
