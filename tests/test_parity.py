"""Invariants 1 and 3 of the method, through the whole Trainer: equal to the bit where equality is promised."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer


def examples(specimen, batches=8):
    rows = []
    for seed in range(batches):
        batch = specimen.batch(seed)
        rows += [{key: value[i] for key, value in batch.items()} for i in range(4)]
    return rows


def arguments(folder, **overrides):
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "seed": 3,
    }
    return TrainingArguments(**(defaults | overrides))


def with_dropout(name):
    """A copy of a specimen that drops out; only BERT and GPT-2 like names of the probability are set."""
    model = SPECIMENS[name].build()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return model


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_one_block_is_the_plain_trainer_to_the_bit(name, accumulation, tmp_path):
    specimen = SPECIMENS[name]
    settings = {
        "max_steps": 20,
        "gradient_accumulation_steps": accumulation,
        "max_grad_norm": 0.5,
        "warmup_steps": 4,
        "weight_decay": 0.1,
    }

    def run(trainer_class, **kwargs):
        trainer = trainer_class(
            with_dropout(name), arguments(tmp_path, **settings), train_dataset=examples(specimen), **kwargs
        )
        trainer.train()
        return trainer

    plain = run(Trainer)
    ours = run(BlockLocalTrainer, block_local=BlockLocalConfig.from_preset("backprop"))
    assert equal(ours.model.state_dict(), plain.model.state_dict())
    for mine, theirs in zip(ours.state.log_history[:-1], plain.state.log_history[:-1], strict=True):
        assert mine == theirs


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", ["bert", "gpt2", "bart", "mixtral"])
def test_stepping_each_block_at_once_changes_no_bit(name, accumulation, tmp_path):
    specimen = SPECIMENS[name]
    results = []
    for step_per_block in (False, True):
        trainer = BlockLocalTrainer(
            with_dropout(name),
            arguments(tmp_path, max_steps=5, gradient_accumulation_steps=accumulation, max_grad_norm=0.3),
            train_dataset=examples(specimen),
            block_local=BlockLocalConfig(num_blocks=4, step_per_block=step_per_block),
        )
        trainer.train()
        results.append((trainer.assembly.module.state_dict(), trainer.state.log_history[:-1]))
    assert equal(results[0][0], results[1][0])
    for deferred, at_once in zip(results[0][1], results[1][1], strict=True):
        assert deferred == pytest.approx(at_once, rel=1e-6)


def test_stepping_each_block_at_once_keeps_gradients_of_one_block_only(tmp_path):
    alive = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            parameters = trainer.assembly.parameters
            alive.append([any(p.grad is not None for p in block) for block in parameters])

    trainer = BlockLocalTrainer(
        SPECIMENS["bert"].build(),
        arguments(tmp_path, max_steps=2),
        train_dataset=examples(SPECIMENS["bert"]),
        callbacks=[Watch()],
        block_local=BlockLocalConfig(num_blocks=4, step_per_block=True),
    )
    trainer.train()
    assert alive == [[False, False, False, True]] * 2


def test_accumulating_micro_batches_gives_the_gradient_of_the_whole_batch(tmp_path):
    """Token-correct: micro-batches with different numbers of labels weigh by tokens, as one large batch does."""
    specimen = SPECIMENS["llama"]
    rows = examples(specimen, batches=4)
    states = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = BlockLocalTrainer(
            specimen.build(),
            arguments(
                tmp_path,
                max_steps=2,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                optim="sgd",
                learning_rate=0.1,
            ),
            train_dataset=rows,
            block_local=BlockLocalConfig(num_blocks=2, negatives=None),
        )
        trainer.train()
        states.append(trainer.assembly.module.state_dict())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-6)


def test_a_block_learns_the_same_wherever_the_blocks_above_it_are_cut(tmp_path):
    """Locality of the whole run: block 0 does not notice how many blocks come after it."""
    specimen = SPECIMENS["bert"]
    firsts = []
    for boundaries in ([1], [1, 2], [1, 2, 3]):
        trainer = BlockLocalTrainer(
            specimen.build(),
            arguments(tmp_path, max_steps=6),
            train_dataset=examples(specimen),
            block_local=BlockLocalConfig(boundaries=boundaries, head_layers=0),
        )
        trainer.train()
        state = trainer.model.state_dict()
        firsts.append({key: state[key] for key in state if ".layer.0." in key or "embeddings" in key})
    assert equal(firsts[0], firsts[1])
    assert equal(firsts[0], firsts[2])


def test_a_trained_model_is_an_ordinary_checkpoint(tmp_path):
    specimen = SPECIMENS["bert"]
    trainer = BlockLocalTrainer(
        specimen.build(),
        arguments(tmp_path, max_steps=2),
        train_dataset=examples(specimen),
        block_local=BlockLocalConfig(num_blocks=2),
    )
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    trainer.model.eval()
    batch = specimen.batch(0)
    assert torch.equal(loaded.eval()(**batch).logits, trainer.model(**batch).logits)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "bert"
    assert BlockLocalConfig.from_pretrained(tmp_path) == trainer.assembly.config
