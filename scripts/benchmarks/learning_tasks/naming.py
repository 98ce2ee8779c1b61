"""Task (e): an encoder-decoder, pretrained to restore masked docstrings, names the function a docstring describes."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from learning_tasks.base import PERPLEXITY, START, Data, Metric, Row, Task, perplexity, split_by_share
from learning_tasks.corpora import named_docstrings
from learning_tasks.pretraining import pretrain_
from learning_tasks.vocabulary import END, MASK, PAD, train_vocabulary
from torch import Tensor


@dataclass(frozen=True)
class Naming(Task):
    """A small T5: docstrings with masked tokens to whole docstrings, then docstrings to names.

    The same texts serve both, in the same splits. Names are cut into words. Forgetting is the perplexity of restored
    docstrings that pretraining has not seen.
    """

    name: ClassVar[str] = "naming"
    title: ClassVar[str] = "encoder-decoder, docstrings to names"
    metric: ClassVar[Metric] = PERPLEXITY
    forgetting: ClassVar[Metric | None] = Metric("perplexity, restoring", higher_is_better=False, form=".2f")
    fills: ClassVar[Mapping[str, int]] = {"input_ids": PAD, "labels": -100}

    blocks: tuple[int, ...] = (2, 4)
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    budget: dict[str, Any] = field(
        default_factory=lambda: {"num_train_epochs": 3, "per_device_train_batch_size": 16, "warmup_steps": 0.1}
    )
    layers: int = 4
    width: int = 128
    heads: int = 4
    vocabulary: int = 2048
    longest: int = 32
    masked: float = 0.3
    train_share: float = 0.5
    validation_share: float = 0.15
    train_texts: int = 2000
    held_out_texts: int = 800
    pretraining: dict[str, Any] = field(
        default_factory=lambda: {
            "num_train_epochs": 12,
            "per_device_train_batch_size": 16,
            "learning_rate": 2e-3,
            "warmup_steps": 0.05,
            "seed": 0,
        }
    )

    @property
    def num_layers(self) -> int:
        """Layers of encoder and decoder together."""
        return 2 * self.layers

    def build(self, folder: Path) -> Data:
        """Pair docstrings with names; pretrain on the docstrings of train."""
        splits = split_by_share(
            named_docstrings(), lambda pair: pair[0], train=self.train_share, validation=self.validation_share
        )
        words = [f"{text}\n{words_of_name(name)}" for text, name in splits[0]]
        tokenizer = train_vocabulary(words, self.vocabulary)

        def ids(text: str) -> list[int]:
            return [*tokenizer.encode(text).ids[: self.longest - 1], END]

        texts = [[ids(text) for text, _ in part] for part in splits]
        limits = (self.train_texts, self.held_out_texts, self.held_out_texts)
        parts = [
            [{"input_ids": ids(text), "labels": ids(words_of_name(name))} for text, name in part[:limit]]
            for part, limit in zip(splits, limits, strict=True)
        ]
        draw = random.Random(0)
        torch.manual_seed(0)
        model = self._new_model()
        pretrain_(model, [self._damaged(text, draw) for text in texts[0]], self.collate, **self.pretraining)
        model.save_pretrained(folder / START)
        return Data(*parts, before=[self._damaged(text, draw) for text in texts[2][:200]])

    def model(self, folder: Path, seed: int) -> Any:
        """Load the pretrained model; the seed only shuffles the data."""
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM.from_pretrained(folder / START)

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Make a batch and the encoder's attention mask."""
        batch = super().collate(rows)
        return {**batch, "attention_mask": (batch["input_ids"] != PAD).long()}

    def score(self, model: Any, rows: Sequence[Row]) -> float:
        """Return the perplexity of a token of the target."""
        return perplexity(self.logits(model, rows), shifted=False)

    def remembered(self, model: Any, folder: Path, data: Data) -> float:
        """Return the perplexity of restored docstrings."""
        return self.score(model, data.before)

    def _new_model(self) -> Any:
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(
            vocab_size=self.vocabulary,
            d_model=self.width,
            d_kv=self.width // self.heads,
            d_ff=4 * self.width,
            num_layers=self.layers,
            num_heads=self.heads,
            dropout_rate=0.0,
            pad_token_id=PAD,
            eos_token_id=END,
            decoder_start_token_id=PAD,
            use_cache=False,
        )
        return T5ForConditionalGeneration(config)

    def _damaged(self, text: list[int], draw: random.Random) -> Row:
        return {"input_ids": [MASK if draw.random() < self.masked else token for token in text], "labels": text}


def words_of_name(name: str) -> str:
    """Cut a name into words in lower case: `getDefaultEncoding` and `get_default_encoding` are the same."""
    return " ".join(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).replace("_", " ").lower().split())
