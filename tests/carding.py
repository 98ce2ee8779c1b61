"""Small runs with cards, and how to read those."""

from __future__ import annotations

import re

from huggingface_hub import ModelCard
from test_parity import arguments, examples
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer
from hf_blocklocal.card import (
    CardFacts,
    Data,
    RunResult,
)
from hf_blocklocal.records.history import BlockOfCut


# What drafts of cards are full of, and what unfilled fields would look like.
PLACEHOLDER = re.compile(
    r"(?i:more information needed|todo|tbd|lorem|path/to|xxx)|\{\{|\}\}|\bNone\b|\bnan\b|<[a-z_ ]+>"
)


BERT = SPECIMENS["bert"]


BLOCKS = (
    BlockOfCut(0, 1, 1200, 30, 0.004, "DirectFeedback, Contrast (gaussian)", "cpu"),
    BlockOfCut(2, 3, 1300, 0, None, "the model's own loss", "cpu"),
)


METRICS = {
    "eval_loss": 0.5,
    "eval_accuracy": 0.75,
    "eval_block_0_loss": 0.7,
    "eval_block_0_accuracy": 0.5,
    "eval_runtime": 3.0,
    "eval_samples_per_second": 10.0,
}


FACTS = CardFacts(
    name="small",
    location=".",
    architecture="BertForSequenceClassification",
    parameters=2500,
    blocks=BLOCKS,
    result=RunResult("block-local, 2 blocks", METRICS, evaluated_at=8, steps=8, epochs=2.0, seconds=4.0),
    auto_class="AutoModelForSequenceClassification",
    pipeline_tag="text-classification",
    has_processor=True,
    data=Data("reviews", eval_rows=48, eval_split="test"),
)


def metadata(path):
    return ModelCard.load(path).data.to_dict()


def section(text, title):
    """The text below a heading."""
    return re.search(rf"^#+ {title}\n(.*?)(?=^#+ |\Z)", text, flags=re.MULTILINE | re.DOTALL)[1].strip()


def lines_of(table):
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in table.splitlines()
        if line.startswith("|")
    ]


def accuracy(output):
    return {"accuracy": (output.predictions.argmax(-1) == output.label_ids.ravel()).mean()}


def trainer_in(folder, *, config=None, model=None, tokenizer=None, **settings):
    rows = examples(BERT)
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2} | settings
    return BlockLocalTrainer(
        BERT.build() if model is None else model,
        arguments(folder, **settings),
        train_dataset=rows,
        eval_dataset=rows[:8],
        processing_class=tokenizer,
        compute_metrics=accuracy,
        block_local=BlockLocalConfig(num_blocks=3, head_layers=0) if config is None else config,
    )


def tokenizer():
    words = {"[PAD]": 0, "[UNK]": 1, "learns": 2}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


def finished_run(folder):
    """Return the trainer of a small run that is finished and saved, and its folder."""
    trainer = trainer_in(folder, tokenizer=tokenizer())
    trainer.train()
    trainer.save_model()
    return trainer, folder
