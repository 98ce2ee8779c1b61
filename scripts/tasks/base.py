"""What a task hands to a trainer, and what all tasks do alike: draw rows, and load a model or make a new one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from hf_blocklocal.errors import TargetError


if TYPE_CHECKING:
    from datasets import DatasetDict
    from recipes import Run


@dataclass(frozen=True)
class Prepared:
    """Everything a trainer of a task is made from.

    Attributes:
        model: The model with its task head.
        train: Examples to learn from, ready to be collated.
        test: Examples to be scored on.
        collator: Makes a batch of them.
        processor: Tokenizer or the like, saved beside the model.
        compute_metrics: As for `Trainer`; None where the loss says it all.
        options: More arguments of `Trainer`.
    """

    model: Any
    train: Any
    test: Any
    collator: Callable[[list[Any]], dict[str, Any]]
    processor: Any
    compute_metrics: Callable[[Any], dict[str, float]] | None = None
    options: dict[str, Any] = field(default_factory=dict)


class Kit(ABC):
    """One task: from rows of a data set to what a trainer needs. Its fields are the `options` of a YAML file."""

    metric: ClassVar[str]
    """Name of the number in the table, as `eval_<metric>` is in the logs."""

    predicts: ClassVar[str]
    """What a head of a block's own predicts, and from which of its states."""

    pipeline: ClassVar[str | None] = None
    """The pipeline that answers the examples of a YAML file in the end."""

    generates: ClassVar[bool] = False
    """Whether evaluations may generate texts."""

    @abstractmethod
    def prepare(self, run: Run) -> Prepared:
        """Load data and model.

        Args:
            run: What a YAML file says.

        Raises:
            TargetError: If the labels of the data set do not match the task.
        """


def load_splits(run: Run, needed: Sequence[str]) -> DatasetDict:
    """Load the data set of a run, or make it, and draw the rows that are asked for.

    Args:
        run: What a YAML file says.
        needed: Columns that the task reads.

    Raises:
        TargetError: If one of them is missing.
    """
    from datasets import DatasetDict, load_dataset

    from tasks.made import make

    name = run.dataset
    splits = make(name.removeprefix("made:")) if name.startswith("made:") else load_dataset(name, run.subset)
    chosen = DatasetDict()
    for split, count in {run.train_split: run.train_samples, run.test_split: run.test_samples}.items():
        rows = splits[split].shuffle(seed=run.training.get("seed", 42))
        if missing := sorted(set(needed) - set(rows.column_names)):
            raise TargetError(
                f"The task {run.task!r} reads the columns {list(needed)}, and {name} has no {missing}, only "
                f"{rows.column_names}. Name the right ones in the YAML file, or choose another data set."
            )
        chosen[split] = rows if count is None else rows.select(range(min(count, len(rows))))
    return chosen


def build_model(run: Run, auto_class: Any, **fields: Any) -> Any:
    """Load the model that a YAML file names, or make a new one, with weights at random, from the fields it lists.

    Args:
        run: What a YAML file says.
        auto_class: The class that picks the task head.
        **fields: What the data say of the configuration, such as the number of classes.
    """
    if isinstance(run.model, str):
        return auto_class.from_pretrained(run.model, **fields)
    from transformers import AutoConfig

    return auto_class.from_config(AutoConfig.for_model(**(run.model | fields)))


def load_tokenizer(run: Run, texts: Sequence[str], *, ends: bool = False) -> Any:
    """Load the tokenizer of a model; of a new one, train one on the texts.

    Args:
        run: What a YAML file says.
        texts: What to train it on.
        ends: Whether a new one marks the end of a text.
    """
    from transformers import AutoTokenizer

    if isinstance(run.model, str):
        return AutoTokenizer.from_pretrained(run.model)
    from tasks.vocabulary import train_tokenizer

    return train_tokenizer(texts, run.model["vocab_size"], ends=ends)


def names_of_classes(splits: DatasetDict, run: Run) -> tuple[DatasetDict, list[str]]:
    """Return splits whose label is a class, in the column `label`, with the names of the classes.

    Raises:
        TargetError: If a label is no class, or one of the test split is not among those of the training split.
    """
    from datasets import ClassLabel

    column = run.label_column
    feature = splits[run.train_split].features[column]
    if not isinstance(feature, ClassLabel):
        if not hasattr(feature, "dtype") or feature.dtype not in ("string", "bool") and "int" not in feature.dtype:
            raise TargetError(
                f"The column {column!r} of {run.dataset} holds {feature}, which is no class. For several labels or "
                "numbers see the options of text-classification in configs/README.md."
            )
        trained, tested = (set(splits[split].unique(column)) for split in (run.train_split, run.test_split))
        if unseen := sorted(tested - trained, key=str):
            raise TargetError(
                f"The split {run.test_split!r} of {run.dataset} has labels that {run.train_split!r} has not: "
                f"{unseen[:5]}. Choose other splits, or more train_samples."
            )
        splits = splits.class_encode_column(column)
        feature = splits[run.train_split].features[column]
    for name, split in splits.items():
        if wrong := sorted({label for label in split.unique(column) if label is None or label < 0}, key=str):
            raise TargetError(f"The column {column!r} of the split {name!r} holds {wrong[0]}, which is no class.")
    return (splits if column == "label" else splits.rename_column(column, "label")), feature.names


def both_ways(names: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a configuration that name its classes."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }
