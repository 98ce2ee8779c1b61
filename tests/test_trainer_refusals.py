"""What cannot work is refused before it has cost anything, in words that say what to do."""

from __future__ import annotations

import pytest
import torch
from test_parity import arguments, equal, examples
from training import make, snapshot
from transformers import TrainerCallback
from zoo import SPECIMENS, build_wav2vec2

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer
from hf_blocklocal.errors import (
    ConfigError,
    CutError,
    LayersNotFoundError,
    NonFiniteLossError,
    SharedLayersError,
    TargetError,
    UnsupportedSettingError,
)
from hf_blocklocal.teaching.report import StepReport


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


def test_a_configuration_of_plain_values_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="was given a dict: {'num_blocks': 2}. Write block_local=BlockLocalConfig"):
        BlockLocalTrainer(SPECIMENS["bert"].build(), arguments(tmp_path), block_local={"num_blocks": 2})


def test_a_model_that_another_trainer_has_split_is_refused(tmp_path):
    model = SPECIMENS["bert"].build()
    model.bert.encoder.layer[3].to("meta")
    with pytest.raises(UnsupportedSettingError, match=r"16 parameters of Bert.* hold no values.*load the model anew"):
        make("bert", tmp_path, model=model)


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


def test_a_last_block_without_trainable_parameters_is_refused(tmp_path):
    model = SPECIMENS["llama"].build().requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    with pytest.raises(UnsupportedSettingError, match="Block 1 .* has no trainable parameter"):
        make("llama", tmp_path, model=model).train()


@pytest.mark.parametrize("step_per_block", [False, True])
def test_losses_are_read_once_in_a_step_because_reading_waits_for_a_gpu(step_per_block, tmp_path, monkeypatch):
    reads, check = [], StepReport.check_finite
    monkeypatch.setattr(StepReport, "check_finite", lambda self, step: (reads.append(step), check(self, step)))
    config = BlockLocalConfig(num_blocks=4, step_per_block=step_per_block, head_layers=0)
    make("bert", tmp_path, config=config).train()
    assert reads == list(range(1, len(reads) + 1))


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
