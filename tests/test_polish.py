"""A global step is ordinary backpropagation, in its place among local ones."""

from __future__ import annotations

import pytest
import torch
from test_parity import arguments, equal, examples, with_dropout
from training import hooks_left, make, snapshot, whole_and_resumed
from transformers import Trainer, TrainerCallback
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer
from hf_blocklocal.errors import NonFiniteLossError
from hf_blocklocal.teaching.polish import is_global


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({}, []),
        ({"global_every": 4}, [3, 7]),
        ({"global_every": 1}, list(range(10))),
        ({"polish": 0.2}, [8, 9]),
        ({"polish": 0.01}, [9]),
        ({"polish": 1.0}, list(range(10))),
        ({"global_every": 6, "polish": 0.1}, [5, 9]),
        ({"global_every": 1, "head_warmup_steps": 8}, [8, 9]),
    ],
)
def test_every_nth_step_and_the_last_phase_are_global(values, steps):
    config = BlockLocalConfig(**values)
    assert [step for step in range(10) if is_global(step, 10, config)] == steps


@pytest.mark.parametrize("step_per_block", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("values", [{"global_every": 1}, {"polish": 1.0}])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_with_global_steps_only_the_weights_are_the_plain_trainers_to_the_bit(
    name, values, accumulation, step_per_block, tmp_path
):
    config = BlockLocalConfig(num_blocks=4, step_per_block=step_per_block, **values)
    settings = {"max_steps": 6, "max_grad_norm": 0, "weight_decay": 0.1, "gradient_accumulation_steps": accumulation}
    states = []
    for kind, extra in ((Trainer, {}), (BlockLocalTrainer, {"block_local": config})):
        trainer = kind(
            with_dropout(name), arguments(tmp_path, **settings), train_dataset=examples(SPECIMENS[name]), **extra
        )
        trainer.train()
        states.append((trainer.model.state_dict(), trainer.state.log_history))
    assert equal(states[0][0], states[1][0])
    assert [row["loss"] for row in states[0][1][:-1]] == [row["loss"] for row in states[1][1][:-1]]
    assert not [key for row in states[1][1] for key in row if key in ("block_0/loss", "block_2/loss")]
    assert not hooks_left(trainer.model)


class Gradients(TrainerCallback):
    """Notes in each step which blocks still have gradients, and which heads."""

    def __init__(self):
        self.blocks, self.heads = [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        with_gradient = {id(p) for p in self.trainer.assembly.module.parameters() if p.grad is not None}
        self.blocks.append([any(id(p) in with_gradient for p in block) for block in self.trainer.assembly.parameters])
        self.heads.append(any(id(p) in with_gradient for p in self.trainer.assembly.heads.parameters()))


def test_all_micro_batches_of_a_global_step_are_global_and_it_waits_for_all_blocks(tmp_path):
    config = BlockLocalConfig(num_blocks=4, global_every=2, step_per_block=True)
    note = Gradients()
    trainer = make("bert", tmp_path, config=config, max_steps=4, gradient_accumulation_steps=2, callbacks=[note])
    note.trainer = trainer
    calls = []
    teach = trainer.assembly.step.teach
    trainer.assembly.step.teach = lambda *args, **kwargs: (
        calls.append(trainer.state.global_step) or teach(*args, **kwargs)
    )
    trainer.train()
    assert calls == [0, 0, 2, 2]
    assert note.blocks == [[False, False, False, True], [True] * 4] * 2
    assert note.heads == [False] * 4


@pytest.mark.parametrize("accumulation", [1, 2])
def test_stepping_at_once_changes_no_bit_with_a_global_step_between(accumulation, tmp_path):
    states = []
    for step_per_block in (False, True):
        config = BlockLocalConfig(num_blocks=4, global_every=2, anchor=10.0, step_per_block=step_per_block)
        settings = {"max_grad_norm": 0.3, "gradient_accumulation_steps": accumulation}
        trainer = make("bert", tmp_path, config=config, max_steps=5, **settings)
        trainer.train()
        states.append(snapshot(trainer))
    assert equal(*states)


def test_each_block_is_clipped_by_itself_in_a_global_step(tmp_path):
    norms = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for block in trainer.assembly.parameters:
                gradients = [p.grad.flatten() for p in block if p.grad is not None]
                norms.append(torch.cat(gradients).norm().item())

    config = BlockLocalConfig(num_blocks=2, global_every=1)
    trainer = make("bert", tmp_path, config=config, max_steps=1, max_grad_norm=0.01, callbacks=[Norms()])
    trainer.train()
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


def test_logs_report_means_over_the_steps_that_had_a_loss(tmp_path):
    local = make("bert", tmp_path, max_steps=1, logging_steps=1)
    mixed = make("bert", tmp_path, config=BlockLocalConfig(num_blocks=2, global_every=2), max_steps=2, logging_steps=2)
    for trainer in (local, mixed):
        trainer.train()
    first, row = local.state.log_history[0], mixed.state.log_history[0]
    assert row["block_0/loss"] == pytest.approx(first["block_0/loss"])
    assert row["block_1/loss"] == pytest.approx(row["loss"])
    assert row["block_1/loss"] != pytest.approx(first["block_1/loss"])


def test_a_batch_without_labels_is_skipped_in_a_global_step(tmp_path):
    rows = examples(SPECIMENS["bert_mlm"])[:8]
    for row in rows[:4]:
        row["labels"] = torch.full_like(row["labels"], -100)
    config = BlockLocalConfig(num_blocks=2, global_every=1)
    trainer = make("bert_mlm", tmp_path, rows=rows, max_steps=4, config=config, train_sampling_strategy="sequential")
    trainer.train()
    assert trainer.state.log_history[-2]["skipped_batches"] == 2
    assert all(torch.isfinite(value).all() for value in snapshot(trainer).values())


def test_a_loss_that_is_not_a_number_is_the_last_blocks(tmp_path):
    trainer = make("bert", tmp_path, config=BlockLocalConfig(num_blocks=4, global_every=1))
    trainer.model.classifier.register_forward_hook(lambda module, args, output: output * float("nan"))
    before = snapshot(trainer)
    with pytest.raises(NonFiniteLossError, match="loss of block 3 is nan at step 1"):
        trainer.train()
    assert equal(before, snapshot(trainer))


@pytest.mark.parametrize("values", [{"global_every": 3}, {"polish": 0.4}])
def test_a_killed_run_resumes_to_the_bit(values, tmp_path):
    saving = {"config": BlockLocalConfig(num_blocks=2, **values), "max_steps": 9}
    saving |= {"save_steps": 4, "gradient_accumulation_steps": 2}
    whole, resumed = whole_and_resumed(tmp_path, killed_after=6, **saving)
    assert equal(snapshot(whole), snapshot(resumed))


@pytest.mark.parametrize("setting", [{"gradient_checkpointing": True}, {"bf16": True}])
def test_global_steps_go_with_checkpointing_and_mixed_precision(setting, tmp_path):
    trainer = make("bert", tmp_path, config=BlockLocalConfig(num_blocks=2, global_every=2), max_steps=4, **setting)
    trainer.train()
    assert trainer.state.global_step == 4


def test_without_polish_a_step_outside_of_a_run_is_local_too():
    assert not is_global(10, 10, BlockLocalConfig())
    assert not is_global(0, 0, BlockLocalConfig())


@pytest.mark.parametrize("values", [{"polish": 1.0}, {"global_every": 1}])
def test_a_polish_of_adapters_is_the_plain_trainers_to_the_bit(values, tmp_path):
    peft = pytest.importorskip("peft")
    config = BlockLocalConfig(num_blocks=4, **values)
    states = []
    for kind, extra in ((Trainer, {}), (BlockLocalTrainer, {"block_local": config})):
        torch.manual_seed(0)
        lora = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
        model = peft.get_peft_model(SPECIMENS["bert"].build(), lora)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        settings = arguments(tmp_path, max_steps=4, max_grad_norm=0)
        trainer = kind(model, settings, train_dataset=examples(SPECIMENS["bert"]), **extra)
        trainer.train()
        states.append(trainer.model.state_dict())
        moved = {key for key, value in states[-1].items() if not torch.equal(value, before[key])}
        assert all("lora" in key or "modules_to_save" in key for key in moved)
        assert all(any(f"layer.{layer}." in key and "lora_B" in key for key in moved) for layer in range(4))
    assert equal(*states)


def test_in_the_last_phase_adapters_of_all_blocks_learn_from_the_models_own_loss(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    note = Gradients()
    config = BlockLocalConfig(num_blocks=4, head_layers=0, polish=0.5)
    model = peft.get_peft_model(SPECIMENS["bert"].build(), lora)
    trainer = make("bert", tmp_path, model=model, config=config, max_steps=4, callbacks=[note])
    note.trainer = trainer
    trainer.train()
    assert note.blocks == [[True] * 4] * 4
    assert note.heads == [True, True, False, False]
