"""The Trainer with blocks on several devices: weights, metrics, checkpoints as on one, and no wait between two logs.

The devices are made of main memory (`several_devices`).
"""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import dispatch_model
from several_devices import CPU, Machine, device
from test_parity import arguments, equal, examples, with_dropout
from transformers import TrainerCallback
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer, truncate
from hf_blocklocal.callbacks import DriftCallback, GradientAlignmentCallback, LinearProbeCallback
from hf_blocklocal.callbacks.portrait import devices_of
from hf_blocklocal.devices import layout
from hf_blocklocal.errors import NonFiniteLossError, UnsupportedSettingError


LATE = {"head_refresh_steps": 2, "head_refresh_lag": 1}
SAVED = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}


@pytest.fixture
def machine(monkeypatch):
    """A machine of three devices, switched on where a test enters it."""
    monkeypatch.setattr(layout, "accelerators", lambda: [device(0), device(1), device(2)])
    return Machine()


def trainer_of(name, folder, config, *, model=None, rows=None, kind=BlockLocalTrainer, **settings):
    given = {key: settings.pop(key) for key in ("compute_loss_func", "callbacks", "model_init") if key in settings}
    return kind(
        with_dropout(name) if model is None and "model_init" not in given else model,
        arguments(folder, **({"max_steps": 4, "logging_steps": 2, "max_grad_norm": 0.5} | settings)),
        train_dataset=examples(SPECIMENS[name]) if rows is None else rows,
        eval_dataset=examples(SPECIMENS[name], 2),
        block_local=config,
        **given,
    )


def apart(**options):
    return BlockLocalConfig(placement="devices", **({"num_blocks": 3} | LATE | options))


def together(**options):
    return BlockLocalConfig(**({"num_blocks": 3} | LATE | options))


def state_of(trainer):
    return {key: value.to("cpu").clone() for key, value in trainer.assembly.module.state_dict().items()}


def numbers(trainer):
    """Return what a run has logged, without times."""
    return [
        {key: value for key, value in row.items() if "runtime" not in key and "per_second" not in key}
        for row in trainer.state.log_history
    ]


def assert_logged_alike(first, second):
    for mine, theirs in zip(numbers(first), numbers(second), strict=True):
        assert mine.keys() == theirs.keys()
        # A loss is a mean in float32 here, and one in float64 where the Trainer takes it.
        assert mine == pytest.approx(theirs, rel=1e-6)


class Watch(TrainerCallback):
    """Writes down what has made the host wait, step by step."""

    def __init__(self, machine):
        self.machine, self.waits = machine, {}

    def on_step_begin(self, args, state, control, **kwargs):
        self.machine.forget()

    def on_step_end(self, args, state, control, **kwargs):
        self.waits[state.global_step] = list(self.machine.waits)


def squared(outputs, labels, num_items_in_batch=None):
    each = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
    return each.square().sum() / num_items_in_batch


CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
CASES = {
    "bert": ("bert", {}, SAVED | {"load_best_model_at_end": True, "metric_for_best_model": "block_0_loss"}),
    "gpt2": ("gpt2", {"tied_weights": "untie", "head_warmup_steps": 1}, {"gradient_accumulation_steps": 2, **SAVED}),
    "vit, at once": ("vit", {"step_per_block": True, "anchor": 1.0}, {}),
    "t5, bf16": ("t5", {"tied_weights": "freeze", "head_layers": 0}, {"bf16": True} | CHECKPOINTED),
    "bert, a loss of one's own": ("bert", {}, {"compute_loss_func": squared}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_trainer_trains_on_several_devices_as_on_one(case, machine, tmp_path):
    name, options, settings = CASES[case]
    one = trainer_of(name, tmp_path / "one", together(**options), **settings)
    one.train()
    watch = Watch(machine)
    with machine.running():
        several = trainer_of(name, tmp_path / "several", apart(**options), callbacks=[watch], **settings)
        several.train()
        predicted = several.predict(examples(SPECIMENS[name], 2))
    assert equal(state_of(several), state_of(one))
    assert_logged_alike(several, one)
    assert set(watch.waits) == {1, 2, 3, 4}
    assert not any(watch.waits.values())
    expected = one.predict(examples(SPECIMENS[name], 2)).metrics
    assert predicted.metrics["test_block_0_loss"] == expected["test_block_0_loss"]
    assert several.args.logging_nan_inf_filter


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_run_is_resumed_on_several_devices_and_on_one(name, machine, tmp_path):
    config = {"anchor": 0.5}
    whole = trainer_of(name, tmp_path / "one", together(**config), **SAVED)
    whole.train()
    with machine.running():
        several = trainer_of(name, tmp_path / "several", apart(**config), **SAVED)
        several.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    assert equal(state_of(several), state_of(whole))
    back = trainer_of(name, tmp_path / "back", together(**config), **SAVED)
    back.train(resume_from_checkpoint=str(tmp_path / "several" / "checkpoint-4"), trial=None)
    assert equal(state_of(back), state_of(whole))


def test_a_device_map_decides_where_blocks_end(machine, tmp_path):
    one = trainer_of("bert", tmp_path / "one", together(num_blocks=2, boundaries=(3,)))
    one.train()
    with machine.running():
        model = with_dropout("bert")
        layers = {f"bert.encoder.layer.{index}": str(device(int(index == 3))) for index in range(4)}
        ends = {"bert.embeddings": str(device(0)), "bert.pooler": str(device(1)), "classifier": str(device(1))}
        model = dispatch_model(model, ends | layers, main_device=str(device(0)))
        assert hasattr(model.classifier, "_hf_hook")
        several = trainer_of("bert", tmp_path / "several", BlockLocalConfig(**LATE), model=model)
        several.train()
        assert not hasattr(model.classifier, "_hf_hook")
        assert several.assembly.config.boundaries == (3,)
        assert devices_of(several.assembly) == {0: "hpu:0", 1: "hpu:1"}
        assert [line.split()[1] for line in several.assembly.describe().splitlines()] == ["device", "hpu:0", "hpu:1"]
    assert equal(state_of(several), state_of(one))


def test_a_model_is_spread_again_by_another_trainer_and_goes_on_working(machine, tmp_path):
    batch = SPECIMENS["bert"].batch(0)
    with machine.running():
        model = with_dropout("bert")
        trainer_of("bert", tmp_path, apart(), model=model)
        second = trainer_of("bert", tmp_path, BlockLocalConfig(**LATE), model=model)  # follows the map of the first
        assert second.assembly.cut.num_blocks == 3
        hooks = len(model.classifier._forward_pre_hooks)
        second.train()
        assert len(model.classifier._forward_pre_hooks) == hooks == 1
        with torch.no_grad():
            logits, twin = model.eval()(**batch).logits, copy.deepcopy(model)(**batch).logits
        assert logits.device == twin.device == device(2)
        assert torch.equal(logits, twin)
        second.save_model(str(tmp_path / "saved"))
    truncate(tmp_path / "saved", num_blocks=1, output=tmp_path / "small")
    assert BlockLocalConfig.from_pretrained(tmp_path / "saved").placement == "devices"
    loaded = type(model).from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, logits)


def test_adapters_learn_on_several_devices(machine, tmp_path):
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(0)
        return peft.get_peft_model(
            with_dropout("bert"), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
        )

    one = trainer_of("bert", tmp_path, together(), model=adapted())
    one.train()
    with machine.running():
        several = trainer_of("bert", tmp_path, apart(), model=adapted())
        several.train()
        assert devices_of(several.assembly) == {0: "hpu:0", 1: "hpu:1", 2: "hpu:2"}
    assert equal(state_of(several), state_of(one))


@pytest.mark.parametrize("kind", [GradientAlignmentCallback, LinearProbeCallback, DriftCallback])
def test_callbacks_see_on_several_devices_what_they_see_on_one(kind, machine, tmp_path):
    def seen(config):
        trainer = trainer_of("bert", tmp_path, config, max_steps=1)
        callback = kind(trainer)
        trainer.add_callback(callback)
        trainer.train()
        return callback.measure()

    one = seen(together(num_blocks=2))
    with machine.running():
        several = seen(apart(num_blocks=2))
    assert several.keys() == one.keys()
    assert several == pytest.approx(one, rel=1e-6)


def test_a_loss_that_is_not_finite_is_told_with_the_next_log_and_no_checkpoint_holds_it(machine, tmp_path):
    sizes = []

    def collate(rows):
        sizes.append(len(rows))
        batch = {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}
        if sizes.count(4) == 3:  # models are traced with smaller batches
            batch["pixel_values"] *= float("nan")
        return batch

    told = "loss of block 0 was not finite at step 3, as is seen after step 4"
    with machine.running():
        trainer = trainer_of("vit", tmp_path, apart(), save_strategy="steps", save_steps=2)
        trainer.data_collator = collate
        with pytest.raises(NonFiniteLossError, match=told):
            trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2"}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mixtral", {}, "output_router_logits=True and blocks on several devices"),
        ("bert", {"model_init": lambda: with_dropout("bert")}, "model_init, .* blocks on several devices"),
        ("bert", {"bf16_full_eval": True}, "bf16_full_eval and blocks on several devices"),
    ],
)
def test_what_cannot_be_on_several_devices_is_refused(name, settings, message, machine, tmp_path):
    with machine.running(), pytest.raises(UnsupportedSettingError, match=message):
        trainer_of(name, tmp_path, apart(head_layers=None), **settings)


def test_without_accelerators_a_model_is_not_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "accelerators", list)
    with pytest.raises(UnsupportedSettingError, match="and there are 0"):
        trainer_of("bert", tmp_path, apart())


def test_a_model_that_waits_to_be_spread_is_not_moved_first(machine, tmp_path):
    seen = []

    class Looks(BlockLocalTrainer):
        def _lay_out(self):
            seen.append({parameter.device for parameter in self.model.parameters()})
            super()._lay_out()

    with machine.running():
        trainer_of("bert", tmp_path, apart(), kind=Looks)
    assert seen == [{CPU}]
