"""Token classification: a class for every word of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hf_blocklocal.errors import TargetError
from hf_blocklocal.targets.batch import IGNORED
from tasks.base import Kit, Prepared, both_ways, build_model, load_splits, load_tokenizer


if TYPE_CHECKING:
    from recipes import Run


@dataclass(frozen=True)
class TokenClassification(Kit):
    """Lists of words, each with a class; of a word's tokens the first has it, the others do not count."""

    metric: ClassVar[str] = "macro_f1"
    predicts: ClassVar[str] = "the class of each word, at its first token"
    pipeline: ClassVar[str | None] = "token-classification"

    def prepare(self, run: Run) -> Prepared:
        """Tokenize the words and load a classifier of tokens."""
        from datasets import ClassLabel
        from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

        from hf_blocklocal.metrics import f1_of_classes, largest_logit

        splits = load_splits(run, [run.text_column, run.label_column])
        feature = getattr(splits[run.train_split].features[run.label_column], "feature", None)
        if not isinstance(feature, ClassLabel):
            raise TargetError(
                f"The task {run.task!r} needs a list of named classes in each row, and the column "
                f"{run.label_column!r} of {run.dataset} holds {splits[run.train_split].features[run.label_column]}."
            )
        tokenizer = load_tokenizer(run, [" ".join(words) for words in splits[run.train_split][run.text_column]])

        def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            return _aligned(tokenizer, rows[run.text_column], rows[run.label_column], run.max_length)

        columns = splits[run.train_split].column_names
        tokens = splits.map(encode, batched=True, remove_columns=columns)
        return Prepared(
            model=build_model(run, AutoModelForTokenClassification, **both_ways(feature.names)),
            train=tokens[run.train_split],
            test=tokens[run.test_split],
            collator=DataCollatorForTokenClassification(tokenizer),
            processor=tokenizer,
            compute_metrics=f1_of_classes(),
            options={"preprocess_logits_for_metrics": largest_logit},
        )


def _aligned(tokenizer: Any, texts: list[list[str]], classes: list[list[int]], max_length: int) -> dict[str, Any]:
    """Tokenize lists of words; the first token of a word has its class."""
    for words, labels in zip(texts, classes, strict=True):
        if len(words) != len(labels):
            raise TargetError(
                f"A row has {len(words)} words and {len(labels)} labels: token classification needs a label for "
                f"every word. It starts with {words[:4]}."
            )
    encoded = tokenizer(texts, is_split_into_words=True, truncation=True, max_length=max_length)
    encoded["labels"] = []
    for row, labels in enumerate(classes):
        words = encoded.word_ids(row)
        first = (word is not None and word != before for word, before in zip(words, [None, *words], strict=False))
        encoded["labels"].append(
            [labels[word] if is_first else IGNORED for word, is_first in zip(words, first, strict=True)]
        )
    return encoded
