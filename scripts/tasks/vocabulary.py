"""A byte-level BPE tokenizer trained on the spot, for models with random weights, with a template for chats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


PAD, END, MASK = "<pad>", "<end>", "<mask>"
CHAT = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def train_tokenizer(texts: Sequence[str], size: int, *, ends: bool) -> Any:
    """Train a tokenizer; ids 0, 1 and 2 are padding, the end of a text and a mask.

    Args:
        texts: What to train it on.
        size: Tokens at most.
        ends: Whether it marks the end of a text by itself.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, END, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, mask_token=MASK, chat_template=CHAT
    )
