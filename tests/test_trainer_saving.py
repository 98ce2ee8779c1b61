"""What a run leaves on disk is all that a run needs to go on."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from test_parity import arguments, equal, examples, with_dropout
from training import make, snapshot, whole_and_resumed
from transformers import TrainingArguments
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer
from hf_blocklocal.errors import HeadsMismatchError


def test_a_checkpoint_holds_config_and_heads(tmp_path):
    trainer = make("bert", tmp_path, blocks=4)
    trainer.train()
    trainer.save_model()
    assert json.loads((tmp_path / "block_local_config.json").read_text())["num_blocks"] == 4
    assert (tmp_path / "block_local_heads.safetensors").is_file()


def test_resuming_with_another_number_of_blocks_is_refused_before_a_weight_changes(tmp_path):
    make("bert", tmp_path, blocks=4, save_strategy="steps", save_steps=3).train()
    other = make("bert", tmp_path, blocks=2, max_steps=6)
    before = snapshot(other)
    with pytest.raises(HeadsMismatchError, match="belong to 4 blocks"):
        other.train(resume_from_checkpoint=True)
    assert equal(before, snapshot(other))


@pytest.mark.parametrize(("device", "apart"), [("cpu:0", False), ("cpu:0", True), ("cuda:0", True)])
def test_several_processes_read_the_optimizer_into_main_memory(device, apart, tmp_path, monkeypatch):
    trainer = make("bert", tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    optimizer, schedule = trainer.optimizer, trainer.lr_scheduler
    states = list(optimizer.state.values())
    saved = [state["exp_avg"].clone() for state in states]
    for state in states:
        state["exp_avg"].fill_(torch.nan)
    schedule.last_epoch = 0
    monkeypatch.setattr(TrainingArguments, "device", torch.device(device))
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    if apart:
        monkeypatch.setattr(trainer, "_chain", object())
    trainer._load_optimizer_and_scheduler(str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(state["exp_avg"], old) for state, old in zip(optimizer.state.values(), saved, strict=True))
    assert schedule.last_epoch == 3


def test_lora_adapters_learn_block_by_block(tmp_path):
    peft = pytest.importorskip("peft")
    base = SPECIMENS["bert"].build()
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    trainer = make("bert", tmp_path, model=peft.get_peft_model(base, lora), max_steps=4, save_strategy="steps")
    before = snapshot(trainer)
    trainer.train()
    after = snapshot(trainer)
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    assert moved
    assert all("lora" in key or key.startswith("heads") or "modules_to_save" in key for key in moved)
    for layer in range(4):
        assert any(f"layer.{layer}." in key and "lora_B" in key for key in moved)
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors").exists()


def adapted():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_dropout=0.1, target_modules=["query", "value"])
    return peft.get_peft_model(SPECIMENS["bert"].build(), lora)


def in_two(**options):
    """A masked language model with dropout, whose heads have parameters and draw negatives."""
    config = BlockLocalConfig(num_blocks=2, negatives=16, **options)
    rows = examples(SPECIMENS["bert_mlm"], batches=6)
    build = partial(with_dropout, "bert_mlm")
    return {"name": "bert_mlm", "build": build, "rows": rows, "config": config, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        (in_two(), "model.safetensors"),
        (in_two(step_per_block=True), "model.safetensors"),
        ({"build": adapted}, "adapter_model.safetensors"),
    ],
    ids=["at the end", "at once", "adapters"],
)
def test_a_run_killed_at_step_7_of_12_and_resumed_ends_with_the_same_bytes(settings, weights, tmp_path):
    whole, resumed = whole_and_resumed(tmp_path, killed_after=7, max_steps=12, save_steps=5, **settings)
    assert equal(snapshot(whole), snapshot(resumed))
    for name in (weights, "block_local_heads.safetensors", "optimizer.pt", "scheduler.pt"):
        first, second = (tmp_path / folder / "checkpoint-12" / name for folder in ("whole", "killed"))
        assert first.read_bytes() == second.read_bytes(), name


def test_a_model_can_be_saved_without_data(tmp_path):
    trainer = BlockLocalTrainer(SPECIMENS["bert"].build(), arguments(tmp_path))
    trainer.save_model()
    assert (tmp_path / "model.safetensors").is_file()
    assert (tmp_path / "block_local_config.json").is_file()


@pytest.mark.parametrize("head_layers", [0, 1])
def test_heads_of_a_saved_run_can_be_evaluated_again(head_layers, tmp_path):
    rows, config = examples(SPECIMENS["bert"]), BlockLocalConfig(head_layers=head_layers)
    trained = make("bert", tmp_path, eval_dataset=rows[:8], max_steps=5, learning_rate=1e-2, config=config)
    trained.train()
    trained.save_model()
    saved = type(trained.model).from_pretrained(tmp_path)
    again = make("bert", tmp_path / "again", model=saved, eval_dataset=rows[:8], config=config)
    again.load_heads(tmp_path)
    assert again.evaluate()["eval_block_0_loss"] == pytest.approx(trained.evaluate()["eval_block_0_loss"], rel=1e-6)
