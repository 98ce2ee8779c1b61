"""What a user of the Trainer expects goes on working with blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_parity import arguments, equal, examples
from torch import nn
from torch.utils.data import IterableDataset
from training import accuracy, hooks_left, make, snapshot
from transformers import EarlyStoppingCallback, TrainerCallback
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer


# ---- Logs, evaluation, prediction ----


def test_logs_carry_the_loss_of_every_block_and_the_last_one_is_the_loss(tmp_path):
    trainer = make("bert", tmp_path, blocks=4, logging_steps=2, max_steps=4)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 2
    for row in logged:
        assert row["block_3/loss"] == pytest.approx(row["loss"])
        assert all(row[f"block_{block}/loss"] > 0 for block in range(4))
    assert not hooks_left(trainer.model)


def test_evaluation_reports_what_each_head_would_have_predicted(tmp_path):
    rows = examples(SPECIMENS["bert"])
    config = BlockLocalConfig(num_blocks=4, head_layers=0)
    trainer = make("bert", tmp_path, config=config, eval_dataset=rows[:11], compute_metrics=accuracy)
    trainer.train()
    metrics = trainer.evaluate()
    assert {f"eval_block_{block}_{what}" for block in range(3) for what in ("loss", "accuracy")} <= metrics.keys()
    trainer.model.eval()
    batch = {key: torch.stack([row[key] for row in rows[:11]]) for key in rows[0]}
    seen = {}
    targets = trainer.assembly.read_targets(batch)
    with (
        torch.no_grad(),
        trainer.assembly.step.boundaries.attached(
            lambda block, hidden, _: seen.update({block: trainer.assembly.heads[block].logits(hidden, targets)})
        ),
    ):
        trainer.model(**batch)
    for block, logits in seen.items():
        hits = (logits.argmax(-1) == batch["labels"]).float().mean().item()
        assert metrics[f"eval_block_{block}_accuracy"] == pytest.approx(hits)
        loss = nn.functional.cross_entropy(logits, batch["labels"]).item()
        assert metrics[f"eval_block_{block}_loss"] == pytest.approx(loss, rel=1e-5)


def test_blocks_are_not_evaluated_when_that_is_turned_off(tmp_path):
    trainer = make(
        "bert", tmp_path, config=BlockLocalConfig(evaluate_blocks=False), eval_dataset=examples(SPECIMENS["bert"])[:4]
    )
    trainer.train()
    assert not [key for key in trainer.evaluate() if "block" in key]


@pytest.mark.parametrize("name", ["bert_tokens", "bert_mlm", "llama", "t5", "bert_multilabel", "bert_regression"])
def test_evaluation_of_every_kind_of_target(name, tmp_path):
    trainer = make(name, tmp_path, eval_dataset=examples(SPECIMENS[name])[:6])
    trainer.train()
    metrics = trainer.evaluate()
    assert np.isfinite(metrics["eval_block_0_loss"])
    assert ("eval_block_0_accuracy" in metrics) == (name != "bert_regression")


def test_predict_works_with_and_without_labels(tmp_path):
    rows = examples(SPECIMENS["bert"])[:6]
    trainer = make("bert", tmp_path)
    trainer.train()
    with_labels = trainer.predict(rows)
    without = trainer.predict([{key: value for key, value in row.items() if key != "labels"} for row in rows])
    assert np.array_equal(with_labels.predictions, without.predictions)
    assert "test_block_0_accuracy" in with_labels.metrics
    assert not [key for key in without.metrics if "block" in key]


def test_evaluation_before_training_is_the_plain_one(tmp_path):
    trainer = make("bert", tmp_path, eval_dataset=examples(SPECIMENS["bert"])[:4])
    assert "eval_loss" in trainer.evaluate()


def test_the_best_model_comes_back_with_its_heads(tmp_path):
    rows = examples(SPECIMENS["bert"])
    trainer = make(
        "bert",
        tmp_path,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_block_0_loss",
        greater_is_better=True,
        learning_rate=1e-2,
        eval_dataset=rows[:8],
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert trainer.evaluate()["eval_block_0_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_early_stopping_stops(tmp_path):
    trainer = make(
        "bert",
        tmp_path,
        max_steps=30,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        learning_rate=0.5,
        save_total_limit=2,
        eval_dataset=examples(SPECIMENS["bert"])[:8],
        callbacks=[EarlyStoppingCallback(2)],
    )
    trainer.train()
    assert trainer.state.global_step < 30


# ---- Runs ----


def test_a_model_made_by_model_init_is_cut_anew_in_every_run(tmp_path):
    trainer = BlockLocalTrainer(
        model_init=SPECIMENS["bert"].build,
        args=arguments(tmp_path, max_steps=2),
        train_dataset=examples(SPECIMENS["bert"]),
        block_local=BlockLocalConfig(num_blocks=2),
    )
    trainer.train()
    first = snapshot(trainer)
    trainer.train()
    assert equal(first, snapshot(trainer))


def test_training_can_go_on_with_a_second_call(tmp_path):
    trainer = make("bert", tmp_path)
    trainer.train()
    first = snapshot(trainer)
    trainer.train()
    assert not equal(first, snapshot(trainer))
    assert not hooks_left(trainer.model)


def test_an_iterable_data_set_is_traced_and_trained_on(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from examples(SPECIMENS["bert"])

    trainer = make("bert", tmp_path, rows=Stream())
    trainer.train()
    assert trainer.state.global_step == 3


def test_tracing_does_not_touch_the_random_stream(tmp_path):
    trainer = make("bert", tmp_path)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    _ = trainer.assembly
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_callbacks_see_an_ordinary_run(tmp_path):
    seen, logged = [], []

    class Recorder(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(set(logs))

        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            seen.append((type(model).__name__, state.global_step, len(optimizer.param_groups)))

    make("bert", tmp_path, callbacks=[Recorder()]).train()
    assert seen == [("BertForSequenceClassification", step, 2) for step in (1, 2, 3)]
    assert {"loss", "grad_norm", "learning_rate", "block_0/loss", "block_1/loss"} <= logged[0]


def test_cutting_by_cost_balances_the_blocks(tmp_path):
    by_layers, by_cost = (
        make(
            "gpt2", tmp_path, config=BlockLocalConfig(num_blocks=3, head_layers=0, latent_dim=4, balance=balance)
        ).assembly.cut.spans
        for balance in ("layers", "cost")
    )
    assert [len(span) for span in by_layers] == [1, 1, 2]
    assert [len(span) for span in by_cost] == [1, 2, 1]  # the language-model head makes the last layer the costliest


# ---- Data ----


def test_a_batch_without_a_single_label_is_skipped_and_counted(tmp_path):
    rows = examples(SPECIMENS["bert_mlm"])[:8]
    for row in rows[:4]:
        row["labels"] = torch.full_like(row["labels"], -100)
    trainer = make("bert_mlm", tmp_path, rows=rows, max_steps=4, train_sampling_strategy="sequential")
    trainer.train()
    assert trainer.state.log_history[-2]["skipped_batches"] == 2
    assert all(torch.isfinite(value).all() for value in trainer.assembly.module.state_dict().values())


def test_unlabelled_first_examples_do_not_mislead_the_trace(tmp_path):
    rows = examples(SPECIMENS["bert_mlm"])
    for row in rows[:6]:
        row["labels"] = torch.full_like(row["labels"], -100)
    plain, misled = make("bert_mlm", tmp_path), make("bert_mlm", tmp_path, rows=rows)
    assert plain.assembly.counts_items is misled.assembly.counts_items is False


@pytest.mark.parametrize("head_layers", [0, 1])
@pytest.mark.parametrize("step_per_block", [False, True])
def test_frozen_lower_blocks_stay_as_they_are(step_per_block, head_layers, tmp_path):
    model = SPECIMENS["bert"].build()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[:2].requires_grad_(False)
    config = BlockLocalConfig(num_blocks=2, step_per_block=step_per_block, head_layers=head_layers)
    trainer = make("bert", tmp_path, model=model, config=config)
    before = snapshot(trainer)
    trainer.train()
    after = snapshot(trainer)
    assert all(torch.equal(before[key], after[key]) for key in before if ".layer.0." in key or ".layer.1." in key)
    if head_layers == 0:
        assert not torch.equal(before["heads.0.readout.linear.weight"], after["heads.0.readout.linear.weight"])
    assert not torch.equal(before["model.classifier.weight"], after["model.classifier.weight"])


def test_an_iterable_data_set_with_a_length_is_traced(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from examples(SPECIMENS["bert"])

        def __len__(self):
            return 32

    make("bert", tmp_path, rows=Stream(), max_steps=1).train()


def test_an_interrupted_run_leaves_nothing_behind(tmp_path):
    class Interrupt(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    interrupted = make("bert_mlm", tmp_path, gradient_accumulation_steps=3, callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    interrupted.remove_callback(Interrupt)
    interrupted.train()
    assert interrupted._micro_batch == 0
    row = interrupted.state.log_history[0]
    assert row["block_1/loss"] == pytest.approx(row["loss"])


def test_a_batch_of_one_is_traced_with_one_example(tmp_path):
    sizes = []

    def collate(rows):
        sizes.append(len(rows))
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    make("bert", tmp_path, per_device_train_batch_size=1, data_collator=collate, max_steps=1).train()
    assert set(sizes) == {1}


def test_labels_may_stand_in_a_column(tmp_path):
    rows = examples(SPECIMENS["bert"])
    columns = [row | {"labels": row["labels"].reshape(1)} for row in rows]
    flat, column = make("bert", tmp_path, rows=rows), make("bert", tmp_path, rows=columns)
    for trainer in (flat, column):
        trainer.train()
    assert equal(snapshot(flat), snapshot(column))


def test_padding_of_sound_does_not_count(tmp_path):
    trainer = make("wav2vec2", tmp_path)
    batch = SPECIMENS["wav2vec2"].batch(0)
    length = batch["input_values"].shape[1]
    batch["attention_mask"] = (torch.arange(length) < length // 2).long().expand(4, -1)
    targets = trainer.assembly.read_targets(batch)
    hidden = torch.randn(4, 31, 16)
    rows, _ = targets.rows(hidden, "pooled", "mean")
    hidden[:, 17:] += 1000
    assert torch.equal(rows, targets.rows(hidden, "pooled", "mean")[0])
