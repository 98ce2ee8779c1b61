"""Trainers of specimens, and runs of them that are killed and resumed."""

from __future__ import annotations

import pytest
from test_parity import arguments, examples
from transformers import TrainerCallback
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


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def whole_and_resumed(folder, name="bert", *, killed_after, build=None, **settings):
    """Run once as a whole, and once killed and resumed, in the folders "whole" and "killed".

    A trainer seeds when it is made, so each is made right before its run; its model comes from `build`.
    """
    settings = {"save_strategy": "steps", **settings}

    def trainer(place):
        return make(name, folder / place, model=None if build is None else build(), **settings)

    whole = trainer("whole")
    whole.train()
    killed = trainer("killed")
    killed.add_callback(Stop(killed_after))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = trainer("killed")
    resumed.train(resume_from_checkpoint=True)
    return whole, resumed


def hooks_left(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
