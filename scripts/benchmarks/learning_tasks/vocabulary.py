"""A byte-level BPE vocabulary trained on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


PAD, END, MASK = 0, 1, 2
SPECIAL = ["<pad>", "<end>", "<mask>"]


def train_vocabulary(texts: Sequence[str], size: int) -> Any:
    """Train a tokenizer; ids 0, 1 and 2 are padding, the end of a text and a mask."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
