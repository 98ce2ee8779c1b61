"""Task (e): an encoder-decoder that restores damaged text has to learn a cipher: the same text in other letters."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_lowercase
from typing import Any, ClassVar

import torch
from torch import Tensor

from learning_tasks.base import START, Data, Metric, Row, Task, perplexity, split_by_share
from learning_tasks.corpora import library_openings
from learning_tasks.pretraining import pretrain_


PAD, END, MASK = 0, 1, 2
LETTERS = f" {ascii_lowercase}"


@dataclass(frozen=True)
class Deciphering(Task):
    """A small MBART on the letters of docstrings: pretrained to fill in masked ones, then the input is enciphered too.

    The cipher exchanges letters, always in the same way, so the encoder has to read anew while what the decoder writes
    stays. A docstring is in the same split before and after. Forgetting is the perplexity with plain input.
    """

    name: ClassVar[str] = "cipher"
    title: ClassVar[str] = "encoder-decoder, enciphered text"
    metric: ClassVar[Metric] = Metric("perplexity", higher_is_better=False, form=".3f")
    forgetting: ClassVar[Metric | None] = Metric("perplexity, plain text", higher_is_better=False, form=".3f")
    fills: ClassVar[Mapping[str, int]] = {"input_ids": PAD, "labels": -100}
    single_stack: ClassVar[bool] = False
    seconds: ClassVar[float] = 20

    blocks: tuple[int, ...] = (2, 4)
    rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    budget: dict[str, Any] = field(
        default_factory=lambda: {"num_train_epochs": 1, "per_device_train_batch_size": 32, "warmup_steps": 0.1}
    )
    encoder_layers: int = 4
    decoder_layers: int = 4
    width: int = 96
    heads: int = 4
    letters: int = 31
    masked: float = 0.15
    train_share: float = 0.5
    validation_share: float = 0.15
    train_texts: int = 4800
    held_out_texts: int = 500
    pretraining: dict[str, Any] = field(
        default_factory=lambda: {
            "max_steps": 900,
            "per_device_train_batch_size": 64,
            "learning_rate": 2e-3,
            "warmup_steps": 0.05,
            "seed": 0,
        }
    )

    @property
    def num_layers(self) -> int:
        """Layers of encoder and decoder together."""
        return self.encoder_layers + self.decoder_layers

    def build(self, folder: Path) -> Data:
        """Cut docstrings into pieces; pretrain on those of train as they are."""
        splits = split_by_share(
            library_openings(), str.encode, train=self.train_share, validation=self.validation_share
        )
        pieces = [list(self._pieces(part)) for part in splits]
        draw = random.Random(0)
        for part in pieces:
            draw.shuffle(part)
        cipher = list(LETTERS)
        draw.shuffle(cipher)
        table = str.maketrans(LETTERS, "".join(cipher))
        limits = (self.train_texts, self.held_out_texts, self.held_out_texts)
        parts = [
            [self._row(text.translate(table), text, draw) for text in part[:limit]]
            for part, limit in zip(pieces, limits, strict=True)
        ]
        torch.manual_seed(0)
        model = self._new_model()
        pretrain_(model, [self._row(text, text, draw) for text in pieces[0]], self.collate, **self.pretraining)
        model.save_pretrained(folder / START)
        return Data(*parts, before=[self._row(text, text, draw) for text in pieces[2][: self.held_out_texts]])

    def model(self, folder: Path, seed: int) -> Any:
        """Load the pretrained model; the seed only shuffles the data."""
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM.from_pretrained(folder / START)

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Make a batch and the encoder's attention mask."""
        batch = super().collate(rows)
        return {**batch, "attention_mask": (batch["input_ids"] != PAD).long()}

    def score(self, model: Any, rows: Sequence[Row]) -> float:
        """Return the perplexity of a letter."""
        return perplexity(self.logits(model, rows, batch=128), shifted=False)

    def remembered(self, model: Any, folder: Path, data: Data) -> float:
        """Return the perplexity with plain input."""
        return self.score(model, data.before)

    def _new_model(self) -> Any:
        from transformers import MBartConfig, MBartForConditionalGeneration

        config = MBartConfig(
            vocab_size=len(LETTERS) + MASK + 1,
            max_position_embeddings=self.letters + 1,
            d_model=self.width,
            encoder_layers=self.encoder_layers,
            decoder_layers=self.decoder_layers,
            encoder_attention_heads=self.heads,
            decoder_attention_heads=self.heads,
            encoder_ffn_dim=4 * self.width,
            decoder_ffn_dim=4 * self.width,
            dropout=0.0,
            pad_token_id=PAD,
            bos_token_id=END,
            eos_token_id=END,
            decoder_start_token_id=END,
            forced_eos_token_id=None,
            use_cache=False,
        )
        return MBartForConditionalGeneration(config)

    def _pieces(self, texts: Iterable[str]) -> Iterable[str]:
        """Reduce texts to letters and spaces, and cut them into pieces of equal length."""
        for text in texts:
            plain = re.sub(r"[^a-z]+", " ", text.lower()).strip()
            for start in range(0, len(plain) - self.letters + 1, self.letters):
                yield plain[start : start + self.letters]

    def _row(self, shown: str, wanted: str, draw: random.Random) -> Row:
        ids = [*self._ids(shown), END]
        return {
            "input_ids": [MASK if token != END and draw.random() < self.masked else token for token in ids],
            "labels": [*self._ids(wanted), END],
        }

    def _ids(self, text: str) -> list[int]:
        return [LETTERS.index(letter) + MASK + 1 for letter in text]
