"""Trainers of specimens, and runs of them that are killed and resumed."""

from __future__ import annotations

import pytest
from test_parity import Stop, arguments, examples
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer


def make(name, folder, *, blocks=2, config=None, rows=None, model=None, **settings):
    kwargs = {key: settings.pop(key) for key in list(settings) if key in TRAINER_KEYS}
    return BlockLocalTrainer(
        SPECIMENS[name].build() if model is None else model,
        arguments(folder, **({"max_steps": 3} | settings)),
        train_dataset=examples(SPECIMENS[name]) if rows is None else rows,
        block_local=config or BlockLocalConfig(num_blocks=blocks),
        **kwargs,
    )


TRAINER_KEYS = {
    "eval_dataset",
    "compute_metrics",
    "callbacks",
    "optimizers",
    "compute_loss_func",
    "data_collator",
}


def snapshot(trainer):
    return {key: value.clone() for key, value in trainer.assembly.module.state_dict().items()}


def whole_and_resumed(folder, *, killed_after, **settings):
    """Run once as a whole, and once killed and resumed, in the folders "whole" and "killed"."""
    settings = {"save_strategy": "steps", **settings}
    whole, killed = (make("bert", folder / name, **settings) for name in ("whole", "killed"))
    whole.train()
    killed.add_callback(Stop(killed_after))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make("bert", folder / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    return whole, resumed


def hooks_left(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
