"""Sequence to sequence: another text for each text, written token by token in evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hf_blocklocal.targets.batch import IGNORED
from tasks.base import Kit, Prepared, build_model, load_splits, load_tokenizer


if TYPE_CHECKING:
    from recipes import Run


@dataclass(frozen=True)
class SequenceToSequence(Kit):
    """A text in the `text_column`, the text to write in the `label_column`."""

    metric: ClassVar[str] = "exact_match"
    predicts: ClassVar[str] = "the tokens of the target: in the decoder at their places, in the encoder from its mean"
    generates: ClassVar[bool] = True

    def prepare(self, run: Run) -> Prepared:
        """Tokenize both texts, and load an encoder with a decoder."""
        from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq

        from hf_blocklocal.metrics import match_of_texts

        splits = load_splits(run, [run.text_column, run.label_column])
        train = splits[run.train_split]
        tokenizer = load_tokenizer(run, [*train[run.text_column], *train[run.label_column]], ends=True)

        def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            return tokenizer(
                rows[run.text_column], text_target=rows[run.label_column], truncation=True, max_length=run.max_length
            )

        def decode(ids: Any) -> list[str]:
            ids = [[token if token != IGNORED else tokenizer.pad_token_id for token in row] for row in ids]
            return tokenizer.batch_decode(ids, skip_special_tokens=True)

        tokens = splits.map(encode, batched=True, remove_columns=train.column_names)
        model = build_model(run, AutoModelForSeq2SeqLM)
        return Prepared(
            model=model,
            train=tokens[run.train_split],
            test=tokens[run.test_split],
            collator=DataCollatorForSeq2Seq(tokenizer, model),
            processor=tokenizer,
            compute_metrics=match_of_texts(decode) if run.training.get("predict_with_generate") else None,
        )
