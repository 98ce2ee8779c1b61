"""Text classification: one class per text or pair of texts, several labels, or a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_blocklocal.errors import TargetError
from tasks.base import Kit, Prepared, both_ways, build_model, load_splits, load_tokenizer, names_of_classes


if TYPE_CHECKING:
    from datasets import DatasetDict
    from recipes import Run


@dataclass(frozen=True)
class TextClassification(Kit):
    """A text, or a pair of texts, and what to say of it.

    Attributes:
        problem: `"one_class"`, `"several_labels"`, a list of classes per text, or `"number"`.
        pair_column: The second text, if there is one.
    """

    pipeline: ClassVar[str | None] = "text-classification"

    problem: Literal["one_class", "several_labels", "number"] = "one_class"
    pair_column: str | None = None

    @property
    def metric(self) -> str:
        """Accuracy, the F1 of all labels together, or the correlation with the numbers."""
        return {"one_class": "accuracy", "several_labels": "f1", "number": "pearson"}[self.problem]

    @property
    def predicts(self) -> str:
        """Class, labels or number, all from the mean over the text."""
        what = {"one_class": "the class", "several_labels": "every label", "number": "the number"}[self.problem]
        return f"{what}, from the mean over the text"

    def __post_init__(self) -> None:
        if self.problem not in ("one_class", "several_labels", "number"):
            raise ValueError(f"problem: {self.problem!r} is not known. Choose one_class, several_labels or number.")

    def prepare(self, run: Run) -> Prepared:
        """Tokenize the texts and load a classifier with an output per class, label or number."""
        from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

        from hf_blocklocal import metrics

        metric = self.metric
        read = [run.text_column, *([self.pair_column] if self.pair_column else [])]
        splits = load_splits(run, [*read, run.label_column])
        if self.problem == "one_class":
            splits, names = names_of_classes(splits, run)
            fields: dict[str, Any] = both_ways(names)
        elif self.problem == "several_labels":
            splits, names = _with_label_vectors(splits, run)
            fields = both_ways(names) | {"problem_type": "multi_label_classification"}
        else:
            splits = _with_numbers(splits, run)
            fields = {"num_labels": 1, "problem_type": "regression"}
        tokenizer = load_tokenizer(run, list(splits[run.train_split][run.text_column]))
        tokens = splits.map(
            lambda rows: tokenizer(*(rows[name] for name in read), truncation=True, max_length=run.max_length),
            batched=True,
            remove_columns=[name for name in splits[run.train_split].column_names if name != "label"],
        )
        computed = {
            "accuracy": metrics.accuracy_of_logits,
            "f1": metrics.f1_of_labels,
            "pearson": metrics.correlation,
        }
        return Prepared(
            model=build_model(run, AutoModelForSequenceClassification, **fields),
            train=tokens[run.train_split],
            test=tokens[run.test_split],
            collator=DataCollatorWithPadding(tokenizer),
            processor=tokenizer,
            compute_metrics=computed[metric](),
        )


def _with_label_vectors(splits: DatasetDict, run: Run) -> tuple[DatasetDict, list[str]]:
    """Turn lists of classes into a 0 or 1 for each class."""
    from datasets import ClassLabel

    column = run.label_column
    inner = getattr(splits[run.train_split].features[column], "feature", None)
    if not isinstance(inner, ClassLabel):
        raise TargetError(
            f"problem: several_labels needs a list of named classes in each row, and the column {column!r} of "
            f"{run.dataset} holds {splits[run.train_split].features[column]}. For one class per row use one_class."
        )
    size = len(inner.names)

    def vectors(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"label": [[float(number in labels) for number in range(size)] for labels in rows[column]]}

    plain = splits.map(lambda rows: {"_labels": rows[column]}, batched=True, remove_columns=[column])
    column = "_labels"
    return plain.map(vectors, batched=True, remove_columns=["_labels"]), inner.names


def _with_numbers(splits: DatasetDict, run: Run) -> DatasetDict:
    """Read labels as floats."""
    from datasets import ClassLabel, Value

    column = run.label_column
    feature = splits[run.train_split].features[column]
    is_number = isinstance(feature, Value) and any(kind in feature.dtype for kind in ("int", "float", "decimal"))
    if isinstance(feature, ClassLabel) or not is_number:
        raise TargetError(
            f"problem: number needs a number in each row, and the column {column!r} of {run.dataset} holds {feature}. "
            "Use one_class or several_labels."
        )
    splits = splits.cast_column(column, Value("float32"))
    return splits if column == "label" else splits.rename_column(column, "label")
