"""Arguments of the Trainer do to blocks what they do to a whole model."""

from __future__ import annotations

import pytest
import torch
from test_parity import arguments, equal, examples, with_dropout
from torch import nn
from training import make, snapshot
from transformers import Trainer
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer
from hf_blocklocal.errors import UnsupportedSettingError


def test_stepping_at_once_is_the_same_for_an_optimizer_that_counts_in_its_groups(tmp_path):
    states = []
    for step_per_block in (False, True):
        config = BlockLocalConfig(num_blocks=4, step_per_block=step_per_block)
        trainer = make("bert", tmp_path, optim="stable_adamw", max_steps=4, config=config, learning_rate=0.05)
        trainer.train()
        states.append(snapshot(trainer))
    assert equal(*states)


@pytest.mark.parametrize("step_per_block", [False, True])
@pytest.mark.parametrize(
    "optim",
    [
        "adamw_torch",
        "adamw_torch_fused",
        "adafactor",
        "sgd",
        "adagrad",
        "rmsprop",
        "stable_adamw",
        "schedule_free_adamw",
    ],
)
def test_every_optimizer_moves_every_block_and_every_head(optim, step_per_block, tmp_path):
    config = BlockLocalConfig(num_blocks=4, step_per_block=step_per_block, head_layers=0)
    trainer = make("bert", tmp_path, optim=optim, max_steps=2, config=config, lr_scheduler_type="constant")
    if step_per_block and optim.startswith("schedule_free"):
        with pytest.raises(UnsupportedSettingError, match="keeps some for all of them"):
            trainer.train()
        return
    before = snapshot(trainer)
    trainer.train()
    after = snapshot(trainer)
    names = {parameter: key for key, parameter in trainer.assembly.module.named_parameters()}
    for block in trainer.assembly.parameters:
        weights = [names[p] for p in block if p.dim() == 2]
        moved = [key for key in weights if not torch.equal(before[key], after[key])]
        assert len(moved) >= len(weights) - 1  # token types of a batch without any stand still
        heads = [key for key in moved if key.startswith("heads")]
        assert heads or block is trainer.assembly.parameters[-1]


@pytest.mark.parametrize("schedule", ["cosine", "constant_with_warmup", "polynomial", "reduce_lr_on_plateau"])
def test_schedules_drive_all_blocks(schedule, tmp_path):
    trainer = make(
        "bert",
        tmp_path,
        lr_scheduler_type=schedule,
        warmup_steps=2,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="eval_loss",
        eval_dataset=examples(SPECIMENS["bert"])[:4],
        config=BlockLocalConfig(step_per_block=True),
    )
    trainer.train()
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    if schedule != "reduce_lr_on_plateau":
        assert len(set(rates)) > 1
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {trainer._get_learning_rate()}


def test_one_block_in_bf16_is_the_plain_trainer_to_the_bit(tmp_path):
    states = []
    for kind, extra in ((Trainer, {}), (BlockLocalTrainer, {"block_local": BlockLocalConfig(num_blocks=1)})):
        trainer = kind(
            with_dropout("bert"),
            arguments(tmp_path, max_steps=5, bf16=True),
            train_dataset=examples(SPECIMENS["bert"]),
            eval_dataset=examples(SPECIMENS["bert"])[:8],
            **extra,
        )
        trainer.train()
        states.append((trainer.model.state_dict(), trainer.evaluate()["eval_loss"]))
    assert equal(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_blocks_learn_in_bf16(name, tmp_path):
    full, half = (make(name, tmp_path, bf16=bf16, max_steps=4, blocks=2) for bf16 in (False, True))
    for trainer in (full, half):
        trainer.train()
    for exact, rough in zip(full.state.log_history[:4], half.state.log_history[:4], strict=True):
        assert rough["block_0/loss"] == pytest.approx(exact["block_0/loss"], rel=0.05)
        assert rough["block_0/loss"] != exact["block_0/loss"]
    assert all(p.dtype == torch.float32 for p in half.assembly.module.parameters())


def test_a_model_in_bf16_weights_learns(tmp_path):
    model, config = SPECIMENS["llama"].build().to(torch.bfloat16), BlockLocalConfig(head_layers=0)
    trainer = make("llama", tmp_path, model=model, learning_rate=1e-2, config=config)
    before = snapshot(trainer)
    trainer.train()
    after = snapshot(trainer)
    assert not torch.equal(before["heads.0.readout.linear.weight"], after["heads.0.readout.linear.weight"])
    assert after["heads.0.readout.linear.weight"].dtype == torch.float32


@pytest.mark.parametrize("name", ["bert", "mixtral", "deberta_v2", "bart"])
def test_checkpointing_inside_blocks_gives_the_same_weights(name, tmp_path):
    states = []
    for checkpointing in (False, True):
        trainer = make(name, tmp_path, gradient_checkpointing=checkpointing, optim="sgd", learning_rate=0.1)
        trainer.train()
        states.append(snapshot(trainer))
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_compiled_layers_learn_the_same(name, tmp_path):
    states = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        trainer = make(name, tmp_path, optim="sgd", learning_rate=0.1, **compiled)
        trainer.train()
        states.append(snapshot(trainer))
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-6)


def test_label_smoothing_smooths_every_block(tmp_path):
    losses = []
    for smoothing in (0.0, 0.3):
        trainer = make("bert", tmp_path, label_smoothing_factor=smoothing, max_steps=1)
        trainer.train()
        losses.append(trainer.state.log_history[0])
    for key in ("loss", "block_0/loss"):
        assert losses[0][key] != losses[1][key]
    assert trainer.assembly.heads[0].loss.label_smoothing == 0.3


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_custom_loss_teaches_every_block(accumulation, tmp_path):
    def doubled(outputs, labels, num_items_in_batch=None):
        return 2 * nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    plain = make("bert", tmp_path, gradient_accumulation_steps=accumulation, max_steps=1)
    custom = make("bert", tmp_path, compute_loss_func=doubled, gradient_accumulation_steps=accumulation, max_steps=1)
    for trainer in (plain, custom):
        trainer.train()
    for key in ("block_0/loss", "loss"):
        assert custom.state.log_history[0][key] == pytest.approx(2 * plain.state.log_history[0][key], rel=1e-5)


def test_an_optimizer_of_ones_own_learns_the_heads_too(tmp_path):
    model = SPECIMENS["bert"].build()
    optimizer, config = torch.optim.SGD(model.parameters(), lr=0.1), BlockLocalConfig(head_layers=0)
    trainer = make("bert", tmp_path, model=model, optimizers=(optimizer, None), config=config)
    before = snapshot(trainer)
    trainer.train()
    assert not torch.equal(before["heads.0.feedback.table.weight"], snapshot(trainer)["heads.0.feedback.table.weight"])


def test_a_custom_loss_sees_the_labels_that_the_user_made(tmp_path):
    shapes = []

    def loss(outputs, labels, num_items_in_batch=None):
        shapes.append((tuple(outputs.logits.shape), tuple(labels.shape)))
        return nn.functional.mse_loss(outputs.logits.squeeze(-1), labels)

    make("bert_regression", tmp_path, compute_loss_func=loss, max_steps=1).train()
    assert shapes == [((4, 1), (4,))] * 2


@pytest.mark.parametrize("head_layers", [0, 1])
def test_a_loss_scaler_survives_a_step_without_labels(head_layers, tmp_path):
    rows = examples(SPECIMENS["bert_mlm"])[:8]
    for row in rows[:4]:
        row["labels"] = torch.full_like(row["labels"], -100)
    config = BlockLocalConfig(num_blocks=2, head_layers=head_layers)
    trainer = make("bert_mlm", tmp_path, rows=rows, max_steps=2, train_sampling_strategy="sequential", config=config)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer.train()
    assert trainer.state.global_step == 2
