"""Task (d): a deep, narrow encoder learns from scratch to put out the reverse of a digit sequence."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from learning_tasks.base import Data, Metric, Row, Task, split_by_share


DIGITS = 10
PAD = DIGITS


@dataclass(frozen=True)
class Reversal(Task):
    """Random digits in, the same digits backwards out, one class per position; nothing is pretrained.

    Sequences differ in length, so a layer cannot reverse them by fixed positions: it has to find the end first.
    """

    name: ClassVar[str] = "reversal"
    title: ClassVar[str] = "reversal of digits, from scratch"
    metric: ClassVar[Metric] = Metric("sequences right in full", higher_is_better=True)
    pretrained: ClassVar[bool] = False
    fills: ClassVar[Mapping[str, int]] = {"input_ids": PAD, "labels": -100}
    curve_every: ClassVar[int | None] = 20
    seconds: ClassVar[float] = 27

    blocks: tuple[int, ...] = (4, 10, 20)
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    budget: dict[str, Any] = field(
        default_factory=lambda: {"max_steps": 200, "per_device_train_batch_size": 64, "warmup_steps": 0.1}
    )
    layers: int = 20
    width: int = 64
    heads: int = 4
    shortest: int = 8
    longest: int = 12
    train_sequences: int = 12_800
    held_out_sequences: int = 500

    @property
    def num_layers(self) -> int:
        """Layers of the encoder."""
        return self.layers

    def build(self, folder: Path) -> Data:
        """Draw sequences of all lengths, none of them twice."""
        wanted = self.train_sequences + 2 * self.held_out_sequences
        draw = random.Random(0)
        drawn = {
            tuple(draw.choices(range(DIGITS), k=draw.randint(self.shortest, self.longest))) for _ in range(2 * wanted)
        }
        splits = split_by_share(sorted(drawn), bytes, train=0.6, validation=0.2)
        limits = (self.train_sequences, self.held_out_sequences, self.held_out_sequences)
        parts = [
            [{"input_ids": list(digits), "labels": list(digits[::-1])} for digits in part[:limit]]
            for part, limit in zip(splits, limits, strict=True)
        ]
        return Data(*parts, before=[])

    def model(self, folder: Path, seed: int) -> Any:
        """Draw the weights of a pre-norm encoder."""
        from transformers import RobertaPreLayerNormConfig, RobertaPreLayerNormForTokenClassification

        torch.manual_seed(seed)
        config = RobertaPreLayerNormConfig(
            vocab_size=DIGITS + 2,
            pad_token_id=PAD,
            bos_token_id=DIGITS + 1,
            eos_token_id=DIGITS + 1,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=2 * self.width,
            max_position_embeddings=self.longest + PAD + 2,  # positions start behind the padding's index
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=DIGITS,
        )
        return RobertaPreLayerNormForTokenClassification(config)

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Make a batch and its attention mask."""
        batch = super().collate(rows)
        return {**batch, "attention_mask": (batch["input_ids"] != PAD).long()}

    def score(self, model: Any, rows: Sequence[Row]) -> float:
        """Return the share of sequences in which every digit is right."""
        right = []
        for logits_BSC, inputs in self.logits(model, rows):
            right.append(((logits_BSC.argmax(-1) == inputs["labels"]) | (inputs["labels"] == -100)).all(-1).cpu())
        return torch.cat(right).float().mean().item()
