"""A subclass that leaves out what it replaces is told so, before it is believed to have trained block by block."""

from __future__ import annotations

import pytest
import torch
from test_parity import arguments, equal, examples
from training import snapshot
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer
from hf_blocklocal.errors import UnsupportedSettingError


OWN, TRAINED = {"head_layers": 0}, {"head_layers": 1, "head_copies": "trained"}


def make(kind, folder, *, blocks=2, heads=OWN, **kwargs):
    return kind(
        SPECIMENS["bert"].build(),
        arguments(folder, max_steps=3),
        train_dataset=examples(SPECIMENS["bert"]),
        block_local=BlockLocalConfig(num_blocks=blocks, **(heads if blocks > 1 else {})),
        **kwargs,
    )


class OfTheModel(BlockLocalTrainer):
    """Optimizes the model, as scripts for the plain Trainer do."""

    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        return self.optimizer


class OfAll(BlockLocalTrainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD(self.assembly.module.parameters(), lr=0.1)
        return self.optimizer


class OfTheTop(BlockLocalTrainer):
    """Optimizes the heads and nothing that they have copies of."""

    def create_optimizer(self, model=None):
        lower = [p for name, p in self.model.named_parameters() if "encoder.layer.0" in name]
        self.optimizer = torch.optim.SGD(lower, lr=0.1)
        return self.optimizer


class WholeBackward(BlockLocalTrainer):
    """Trains by backpropagation, in a training step of its own."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


class ThroughParent(BlockLocalTrainer):
    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)


class OwnLoss(BlockLocalTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        outputs = model(**inputs)
        loss = outputs.loss + outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize(("heads", "said"), [(OWN, "heads.0.readout"), (TRAINED, "heads.0.loan")])
def test_an_optimizer_without_the_heads_is_refused_before_a_weight_has_moved(heads, said, tmp_path):
    trainer = make(OfTheModel, tmp_path, heads=heads)
    before = snapshot(trainer)
    with pytest.raises(UnsupportedSettingError, match=f"OfTheModel.create_optimizer has made leaves out .*{said}"):
        trainer.train()
    assert equal(before, snapshot(trainer))


@pytest.mark.parametrize(("kind", "heads"), [(OfAll, OWN), (OfAll, TRAINED), (OfTheTop, TRAINED)])
def test_an_optimizer_that_knows_what_learns_is_taken(kind, heads, tmp_path):
    make(kind, tmp_path, heads=heads).train()


class WithRates(BlockLocalTrainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD(self.assembly.module.parameters(), lr=0.1)
        self.assembly.set_learning_rates_(self.optimizer)
        return self.optimizer


def test_an_optimizer_that_knows_nothing_of_rates_is_refused_where_they_are_asked_for(tmp_path):
    heads = {**OWN, "block_lr_decay": 0.5}
    with pytest.raises(UnsupportedSettingError, match=r"OfAll.create_optimizer has made knows nothing of .*decay=0.5"):
        make(OfAll, tmp_path, heads=heads).train()
    trainer = make(WithRates, tmp_path, heads=heads)
    trainer.train()
    assert len({group["initial_lr"] for group in trainer.optimizer.param_groups}) == 2
    assert "0.50" in trainer.assembly.describe()


def test_an_optimizer_that_knows_nothing_of_the_default_s_rates_is_taken_and_they_are_not_told(tmp_path, caplog):
    model = SPECIMENS["bert"].build()
    model.save_pretrained(tmp_path / "start")
    model = type(model).from_pretrained(tmp_path / "start")
    trainer = OfAll(
        model,
        arguments(tmp_path, max_steps=2),
        train_dataset=examples(SPECIMENS["bert"]),
        block_local=BlockLocalConfig(num_blocks=2, **OWN),
    )
    assert "rate" in trainer.assembly.describe()
    trainer.train()
    assert "OfAll.create_optimizer has made has rates of its own" in caplog.text
    assert "rate" not in trainer.assembly.describe()


def test_a_training_step_that_teaches_no_block_is_refused(tmp_path):
    trainer = make(WholeBackward, tmp_path)
    before = snapshot(trainer)
    with pytest.raises(UnsupportedSettingError, match="WholeBackward.training_step has taught no block"):
        trainer.train()
    assert equal(before, snapshot(trainer))
    make(ThroughParent, tmp_path).train()


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(examples(SPECIMENS["bert"])[:4])


def test_an_epoch_without_a_step_is_no_fault_of_anyone(tmp_path):
    # A resumed stream may be at its end before the first step.
    for steps, checkpoint in ((4, None), (6, True)):
        trainer = BlockLocalTrainer(
            SPECIMENS["bert"].build(),
            arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=4, per_device_train_batch_size=2),
            train_dataset=Stream(),
            block_local=BlockLocalConfig(num_blocks=2, **OWN),
        )
        trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 6


def test_a_single_block_may_be_trained_in_any_way(tmp_path, caplog):
    for kind in (OfTheModel, WholeBackward, OwnLoss):
        make(kind, tmp_path, blocks=1).train()
    assert "teaches the last block alone" not in caplog.text


def test_a_loss_of_a_subclass_is_said_to_teach_the_last_block_alone(tmp_path, caplog):
    make(ThroughParent, tmp_path, compute_loss_func=lambda outputs, labels, **_: outputs.logits.sum()).train()
    assert caplog.text.count("teaches the last block alone") == 0
    make(OwnLoss, tmp_path).train()
    assert caplog.text.count("OwnLoss.compute_loss teaches the last block alone") == 1
