"""What a user of the Trainer expects goes on working with blocks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_parity import Stop, arguments, equal, examples, with_dropout
from torch import nn
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from zoo import SPECIMENS, build_wav2vec2

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer
from hf_blocklocal.errors import (
    CutError,
    HeadsMismatchError,
    LayersNotFoundError,
    NonFiniteLossError,
    SharedLayersError,
    TargetError,
    UnsupportedSettingError,
)


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


# ---- Settings ----


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


@pytest.mark.parametrize("name", ["bert", "mixtral", "deberta_v2"])
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


def test_an_optimizer_and_scheduler_of_ones_own_are_refused(tmp_path):
    model = SPECIMENS["bert"].build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(UnsupportedSettingError, match="lr_scheduler_type"):
        make(
            "bert",
            tmp_path,
            model=model,
            optimizers=(optimizer, scheduler),
            config=BlockLocalConfig(head_layers=0),
        ).train()


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
        make("gpt2", tmp_path, config=BlockLocalConfig(num_blocks=3, balance=balance)).assembly.cut.spans
        for balance in ("layers", "cost")
    )
    assert [len(span) for span in by_layers] == [1, 1, 2]
    assert [len(span) for span in by_cost] == [1, 2, 1]  # the language-model head makes the last layer the costliest


# ---- Saving ----


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


def test_a_killed_run_of_adapters_resumes_to_the_bit(tmp_path):
    peft = pytest.importorskip("peft")

    def trainer(folder, *callbacks):
        torch.manual_seed(0)
        lora = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_dropout=0.1, target_modules=["query", "value"])
        model = peft.get_peft_model(SPECIMENS["bert"].build(), lora)
        saving = {"save_strategy": "steps", "save_steps": 5}
        return make("bert", tmp_path / folder, model=model, max_steps=12, callbacks=list(callbacks), **saving)

    whole = trainer("whole")  # a trainer seeds when it is made, so each is made right before its run
    whole.train()
    killed = trainer("killed", Stop(7))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = trainer("killed")
    resumed.train(resume_from_checkpoint=True)
    assert equal(snapshot(whole), snapshot(resumed))


# ---- Bad input ----


def test_a_batch_without_a_single_label_is_skipped_and_counted(tmp_path):
    rows = examples(SPECIMENS["bert_mlm"])[:8]
    for row in rows[:4]:
        row["labels"] = torch.full_like(row["labels"], -100)
    trainer = make("bert_mlm", tmp_path, rows=rows, max_steps=4, train_sampling_strategy="sequential")
    trainer.train()
    assert trainer.state.log_history[-2]["skipped_batches"] == 2
    assert all(torch.isfinite(value).all() for value in trainer.assembly.module.state_dict().values())


@pytest.mark.parametrize("step_per_block", [False, True])
@pytest.mark.parametrize("block", [0, 1, 3])
def test_a_loss_that_is_not_a_number_is_named_and_touches_no_weight(block, step_per_block, tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                last = trainer.model.classifier if block == 3 else trainer.assembly.heads[block].readout.linear
                last.register_forward_hook(lambda module, args, output: output * float("nan"))
                self.before = snapshot(trainer)

    poison = Poison()
    config = BlockLocalConfig(num_blocks=4, step_per_block=step_per_block, head_layers=0)
    trainer = make("bert", tmp_path, config=config, callbacks=[poison])
    with pytest.raises(NonFiniteLossError, match=f"block {block} is nan at step 2"):
        trainer.train()
    after = snapshot(trainer)
    assert all(torch.isfinite(value).all() for value in after.values())
    names = {parameter: key for key, parameter in trainer.assembly.module.named_parameters()}
    for mine in trainer.assembly.parameters[block:]:
        assert all(torch.equal(after[names[p]], poison.before[names[p]]) for p in mine)


def test_more_blocks_than_layers(tmp_path):
    with pytest.raises(CutError, match="Cannot cut 4 layers into 5 blocks"):
        make("bert", tmp_path, blocks=5)


def test_boundaries_beyond_the_layers(tmp_path):
    with pytest.raises(CutError, match="between 1 and 3"):
        make("bert", tmp_path, config=BlockLocalConfig(boundaries=[2, 4]))


def test_layers_shared_across_depth(tmp_path):
    with pytest.raises(SharedLayersError, match="shares layers across depth"):
        make("albert", tmp_path)


def test_layers_that_are_not_there(tmp_path):
    with pytest.raises(LayersNotFoundError, match=r"bert\.encoder\.layer"):
        make("bert", tmp_path, config=BlockLocalConfig(layers=["model.layers"]))


def test_layer_drop(tmp_path):
    with pytest.raises(UnsupportedSettingError, match="LayerDrop is on"):
        make("wav2vec2", tmp_path, model=build_wav2vec2(0.5))


def test_labels_missing_from_the_batch(tmp_path):
    rows = [{key: value for key, value in row.items() if key != "labels"} for row in examples(SPECIMENS["bert"])]
    with pytest.raises(TargetError, match="holds no 'labels', only"):
        make("bert", tmp_path, rows=rows).train()


def test_no_data_to_trace_with(tmp_path):
    trainer = BlockLocalTrainer(SPECIMENS["bert"].build(), arguments(tmp_path))
    with pytest.raises(TargetError, match="train_dataset"):
        _ = trainer.assembly


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"optim": "lomo"}, "steps inside the backward pass"),
        ({"optim": "galore_adamw_layerwise", "optim_target_modules": ["attn"]}, "steps inside the backward pass"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
    ],
)
def test_arguments_that_cannot_work(setting, text, tmp_path):
    with pytest.raises(UnsupportedSettingError, match=text):
        make("bert", tmp_path, **setting)


def test_a_custom_loss_for_a_target_per_position_is_refused(tmp_path):
    with pytest.raises(UnsupportedSettingError, match="target per position"):
        make("llama", tmp_path, compute_loss_func=lambda *args, **kwargs: None).train()


def test_label_smoothing_of_a_regression_is_refused(tmp_path):
    with pytest.raises(UnsupportedSettingError, match="regression"):
        make("bert_regression", tmp_path, label_smoothing_factor=0.1).train()


# ---- Found by review ----


def test_unlabelled_first_examples_do_not_mislead_the_trace(tmp_path):
    rows = examples(SPECIMENS["bert_mlm"])
    for row in rows[:6]:
        row["labels"] = torch.full_like(row["labels"], -100)
    plain, misled = make("bert_mlm", tmp_path), make("bert_mlm", tmp_path, rows=rows)
    assert plain.assembly.counts_items is misled.assembly.counts_items is False


def test_a_custom_loss_sees_the_labels_that_the_user_made(tmp_path):
    shapes = []

    def loss(outputs, labels, num_items_in_batch=None):
        shapes.append((tuple(outputs.logits.shape), tuple(labels.shape)))
        return nn.functional.mse_loss(outputs.logits.squeeze(-1), labels)

    make("bert_regression", tmp_path, compute_loss_func=loss, max_steps=1).train()
    assert shapes == [((4, 1), (4,))] * 2


def test_a_last_block_without_trainable_parameters_is_refused(tmp_path):
    model = SPECIMENS["llama"].build().requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    with pytest.raises(UnsupportedSettingError, match="Block 1 .* has no trainable parameter"):
        make("llama", tmp_path, model=model).train()


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


@pytest.mark.parametrize("step_per_block", [False, True])
def test_a_gradient_that_is_not_finite_is_named(step_per_block, tmp_path):
    """As when another process sends its own in: the loss here is finite."""
    config = BlockLocalConfig(num_blocks=2, step_per_block=step_per_block, head_layers=0)
    trainer = make("bert", tmp_path, config=config)
    weight = trainer.assembly.heads[0].readout.linear.weight
    weight.register_hook(lambda gradient: gradient * float("nan"))
    before = snapshot(trainer)
    with pytest.raises(NonFiniteLossError, match="gradient of block 0 is not finite at step 1"):
        trainer.train()
    assert equal(before, snapshot(trainer))


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
