"""Task (b): a causal language model, pretrained on the library of Python, reads the Language Reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch

from learning_tasks.base import PERPLEXITY, START, Data, Metric, Row, Task, perplexity, share_of, split_by_share
from learning_tasks.corpora import library_code, library_prose, topic_paragraphs
from learning_tasks.pretraining import pretrain_
from learning_tasks.vocabulary import END, train_vocabulary


@dataclass(frozen=True)
class LanguageModel(Task):
    """A small Llama: pretrained by backpropagation on one domain, fine-tuned on another.

    Forgetting is the perplexity on docstrings and sources that pretraining has not seen.
    """

    name: ClassVar[str] = "language"
    title: ClassVar[str] = "causal language model, new domain"
    metric: ClassVar[Metric] = PERPLEXITY
    forgetting: ClassVar[Metric | None] = Metric("perplexity, old domain", higher_is_better=False, form=".2f")
    seconds: ClassVar[float] = 25

    blocks: tuple[int, ...] = (2, 4)
    rates: tuple[float, ...] = (3e-3, 6e-3, 1.2e-2)
    budget: dict[str, Any] = field(
        default_factory=lambda: {"num_train_epochs": 2, "per_device_train_batch_size": 8, "warmup_steps": 0.1}
    )
    layers: int = 8
    width: int = 128
    heads: int = 4
    vocabulary: int = 2048
    context: int = 128
    pretraining_chunks: int = 7200
    train_share: float = 0.5
    validation_share: float = 0.15
    pretraining: dict[str, Any] = field(
        default_factory=lambda: {
            "num_train_epochs": 1,
            "per_device_train_batch_size": 16,
            "learning_rate": 2e-3,
            "warmup_steps": 0.05,
            "lr_scheduler_type": "cosine",
            "seed": 0,
        }
    )

    @property
    def num_layers(self) -> int:
        """Layers of the language model."""
        return self.layers

    def build(self, folder: Path) -> Data:
        """Train vocabulary and model on the library; cut the Language Reference into chunks."""
        documents = library_prose() + library_code()
        known, held_out = split_documents(documents)
        tokenizer = train_vocabulary(known, self.vocabulary)
        generator = torch.Generator().manual_seed(0)
        old = self._chunks(tokenizer, known, limit=4 * self.pretraining_chunks)
        old = [old[i] for i in torch.randperm(len(old), generator=generator)[: self.pretraining_chunks].tolist()]
        before = self._chunks(tokenizer, held_out, limit=4000)
        before = [before[i] for i in torch.randperm(len(before), generator=generator)[:100].tolist()]
        paragraphs = topic_paragraphs()
        splits = split_by_share(paragraphs, str.encode, train=self.train_share, validation=self.validation_share)
        in_order = {text: place for place, text in enumerate(paragraphs)}
        parts = [self._chunks(tokenizer, sorted(part, key=in_order.__getitem__)) for part in splits]
        torch.manual_seed(0)
        model = self._new_model()
        pretrain_(model, old, self.collate, **self.pretraining)
        model.save_pretrained(folder / START)
        return Data(*parts, before=before)

    def model(self, folder: Path, seed: int) -> Any:
        """Load the pretrained model; nothing in it is new, so the seed only shuffles the data."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder / START)

    def score(self, model: Any, rows: Sequence[Row]) -> float:
        """Return the perplexity."""
        return perplexity(self.logits(model, rows, batch=16), shifted=True)

    def remembered(self, model: Any, folder: Path, data: Data) -> float:
        """Return the perplexity on the pretraining domain."""
        return self.score(model, data.before)

    def _new_model(self) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            intermediate_size=8 * self.width // 3 // 32 * 32,  # three matrices in place of two
            max_position_embeddings=self.context,
            use_cache=False,
        )
        return LlamaForCausalLM(config)

    def _chunks(self, tokenizer: Any, texts: Iterable[str], limit: int | None = None) -> list[Row]:
        """Join texts with an end mark between them and cut the stream into chunks of full length."""
        ids = list(chain.from_iterable([*encoded.ids, END] for encoded in tokenizer.encode_batch(list(texts))))
        starts = range(0, len(ids) - self.context + 1, self.context)
        chunks = [ids[start : start + self.context] for start in starts]
        return [{"input_ids": chunk, "labels": chunk} for chunk in chunks[:limit]]


def split_documents(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide documents, each by its own hash, into those for pretraining and one in twenty held out."""
    known = [text for text in documents if share_of(text) >= 0.05]
    return known, [text for text in documents if share_of(text) < 0.05]
