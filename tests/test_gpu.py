"""What only a GPU can show: loss scaling in fp16, memory that is really given back, and where the host waits."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_parity import examples
from transformers import Trainer, TrainingArguments
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer, assemble


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def run(kind, folder, *, name="bert", config=None, **settings):
    extra = {} if kind is Trainer else {"block_local": config or BlockLocalConfig(num_blocks=2)}
    trainer = kind(
        SPECIMENS[name].build(),
        TrainingArguments(
            str(folder),
            report_to=[],
            disable_tqdm=True,
            max_steps=6,
            save_strategy="no",
            logging_steps=1,
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            **settings,
        ),
        train_dataset=examples(SPECIMENS[name]),
        **extra,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "mixtral", "vit"])
@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
def test_blocks_learn_on_a_gpu(name, precision, tmp_path):
    trainer = run(BlockLocalTrainer, tmp_path, name=name, gradient_accumulation_steps=2, **precision)
    losses = [row["block_0/loss"] for row in trainer.state.log_history if "block_0/loss" in row]
    assert len(losses) == 6
    assert all(torch.isfinite(torch.tensor(losses)))


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
def test_one_block_is_the_plain_trainer(precision, tmp_path):
    one = run(BlockLocalTrainer, tmp_path, config=BlockLocalConfig(num_blocks=1), full_determinism=True, **precision)
    plain = run(Trainer, tmp_path, full_determinism=True, **precision)
    for key, value in plain.model.state_dict().items():
        assert torch.equal(one.model.state_dict()[key], value), key


class Overflowing(BlockLocalTrainer):
    """Begins with a loss scale that is far too large."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24)


def deferred_and_at_once(kind, folder, **settings):
    """Train four blocks that are stepped together, and four that are stepped one by one: to the bit the same."""
    deferred, at_once = (
        run(
            kind,
            folder,
            full_determinism=True,
            config=BlockLocalConfig(num_blocks=4, step_per_block=step_per_block),
            **settings,
        )
        for step_per_block in (False, True)
    )
    for key, value in deferred.assembly.module.state_dict().items():
        assert value.isfinite().all(), key
        assert torch.equal(at_once.assembly.module.state_dict()[key], value), key
    return deferred, at_once


def test_scales_that_are_too_large_are_lowered_whenever_blocks_are_stepped(tmp_path):
    runs = deferred_and_at_once(Overflowing, tmp_path, fp16=True)
    states = [trainer.accelerator.scaler.state_dict() for trainer in runs]
    assert states[0] == states[1]
    assert states[0]["scale"] < 2**24
    assert any("overflows" in key for key in runs[0].state.log_history[0])


@pytest.mark.parametrize("precision", [{}, {"fp16": True}])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_stepping_each_block_at_once_changes_no_bit(name, precision, tmp_path):
    deferred_and_at_once(BlockLocalTrainer, tmp_path, name=name, **precision)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_heads_that_borrow_make_the_host_wait_no_more_often_than_the_model_does(name, monkeypatch):
    specimen, gpu = SPECIMENS[name], torch.device("cuda")
    batches = [{key: value.to(gpu) for key, value in specimen.batch(step).items()} for step in range(3)]

    def waits_of(run):
        run(batches[1])  # memory and libraries are there from the second run on
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                run(batches[2])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in heard)

    model = specimen.build().to(gpu).train()
    model.config.use_cache = False
    assembly = assemble(model, BlockLocalConfig(num_blocks=3), batches[0])

    def taught(batch):
        targets = assembly.read_targets(batch)
        lesson = assembly.step.teach(
            targets, scale=1.0, backward=torch.Tensor.backward, learned=lambda *_: None, inputs=batch, seed=(0,)
        )
        with lesson:
            model(**batch).loss.backward()

    plainly = waits_of(lambda batch: model(**batch).loss.backward())
    read = waits_of(assembly.read_targets)
    assert waits_of(taught) - read <= plainly
    monkeypatch.setattr("hf_blocklocal.teaching.step.is_waited_for", lambda inputs: False)
    assert waits_of(taught) - read > plainly
