"""The trainer for sequences generates in evaluations with the whole model, and scores its heads beside that."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments
from zoo import IGNORED, SPECIMENS, TARGET_LENGTHS

from hf_blocklocal import BlockLocalConfig, BlockLocalSeq2SeqTrainer
from hf_blocklocal.errors import UnsupportedSettingError


class Texts(Dataset):
    def __init__(self, name):
        batch = SPECIMENS[name].batch(0)
        self.rows = [{key: value[row] for key, value in batch.items()} for row in range(len(TARGET_LENGTHS))]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def exact(prediction):
    """Share of texts that were written to the letter."""
    written, given = prediction.predictions[:, 1:], prediction.label_ids
    wanted = [[token for token in row if token != IGNORED] for row in given]
    return {"exact": sum(list(a[: len(b)]) == b for a, b in zip(written, wanted, strict=True)) / len(wanted)}


def build(kind, name, folder, *, steps=1, model=None, arguments=Seq2SeqTrainingArguments, block_local=None, **options):
    generating = (
        {"predict_with_generate": True, "generation_max_length": 10} if arguments is not TrainingArguments else {}
    )
    settings = generating | {"max_steps": steps, "learning_rate": 1e-2, "per_device_train_batch_size": 4} | options
    return kind(
        SPECIMENS[name].build() if model is None else model,
        arguments(str(folder), report_to="none", use_cpu=True, save_strategy="no", **settings),
        train_dataset=Texts(name),
        eval_dataset=Texts(name),
        compute_metrics=exact,
        **({} if block_local is None else {"block_local": block_local}),
    )


@pytest.mark.parametrize(("name", "head_layers"), [("t5", 0), ("t5", 1), ("bart", 0)])
def test_it_writes_what_the_plain_trainer_would_have_written_with_the_same_weights(name, head_layers, tmp_path):
    cut = BlockLocalConfig(num_blocks=4, head_layers=head_layers)
    ours = build(BlockLocalSeq2SeqTrainer, name, tmp_path, steps=5, block_local=cut)
    ours.train()
    plain = build(Seq2SeqTrainer, name, tmp_path, model=ours.model)
    mine, theirs = ours.evaluate(), plain.evaluate()
    assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
    assert mine["eval_exact"] == theirs["eval_exact"]
    for block in range(3):
        assert 0 <= mine[f"eval_block_{block}_accuracy"] <= 1
    written, expected = ours.predict(Texts(name)).predictions, plain.predict(Texts(name)).predictions
    assert (written == expected).all()
    assert "generate" not in vars(ours.model)


def test_the_heads_are_scored_on_the_given_texts_whatever_is_generated(tmp_path):
    scores = [
        build(
            BlockLocalSeq2SeqTrainer,
            "t5",
            tmp_path,
            block_local=BlockLocalConfig(num_blocks=2, head_layers=0),
            predict_with_generate=generates,
        )
        for generates in (True, False)
    ]
    for trainer in scores:
        trainer.compute_metrics = None
        trainer.train()
    first, second = (trainer.evaluate() for trainer in scores)
    assert first["eval_block_0_loss"] == pytest.approx(second["eval_block_0_loss"], rel=1e-6)


def test_one_block_is_the_plain_trainer(tmp_path):
    ours = build(BlockLocalSeq2SeqTrainer, "t5", tmp_path, steps=3, block_local=BlockLocalConfig(num_blocks=1))
    plain = build(Seq2SeqTrainer, "t5", tmp_path, steps=3)
    for trainer in (ours, plain):
        trainer.train()
    for mine, theirs in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def changed(name, **values):
    model = SPECIMENS[name].build()
    for key, value in values.items():
        setattr(model.generation_config, key, value)
    return model


REFUSED = {
    "bert": ({}, {}, "does not. Load it by AutoModelForSeq2SeqLM"),
    "bart": ({}, {"generation_max_length": 64}, "generation_max_length=64 is longer than the 32 positions"),
    "t5": ({"eos_token_id": 4000}, {}, "eos_token_id=4000, and the model knows the tokens 0 to 95"),
}
MORE = [
    ("bart", {"max_new_tokens": 100}, {"generation_max_length": None}, "max_new_tokens=100 is longer"),
    ("t5", {"decoder_start_token_id": None, "bos_token_id": None}, {}, "no token that a text starts with"),
    ("t5", {"num_beams": 1, "early_stopping": True}, {}, "contradicts itself"),
    ("t5", {}, {"generation_num_beams": 0}, "generation_num_beams=0 must be at least 1"),
]


@pytest.mark.parametrize(
    ("name", "values", "options", "message"), [*((name, *case) for name, case in REFUSED.items()), *MORE]
)
def test_what_the_model_cannot_generate_is_refused_before_training(name, values, options, message, tmp_path):
    with pytest.raises(UnsupportedSettingError, match=message):
        build(
            BlockLocalSeq2SeqTrainer,
            name,
            tmp_path,
            model=changed(name, **values) if values else None,
            block_local=BlockLocalConfig(num_blocks=2),
            **options,
        )


def test_arguments_of_another_trainer_are_refused(tmp_path):
    with pytest.raises(UnsupportedSettingError, match="takes Seq2SeqTrainingArguments, not TrainingArguments"):
        build(BlockLocalSeq2SeqTrainer, "t5", tmp_path, arguments=TrainingArguments)
