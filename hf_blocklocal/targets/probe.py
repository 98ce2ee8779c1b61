"""Take a small batch from a data set to trace a model with, and leave everything as it was found.

Random streams and the generators of a collator are given back; a stream that can be read only once loses what was
taken from it.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from hf_blocklocal.errors import TargetError
from hf_blocklocal.targets.batch import IGNORED


# Examples looked at in search of some with a label.
_SEARCHED = 64


def dataset_to_trace(train: Any, evaluation: Any) -> Any:
    """Choose the data set to take a batch from: that for training, else one of those for evaluation.

    Raises:
        TargetError: If there is none.
    """
    dataset = train if train is not None else evaluation
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()))
    if dataset is None:
        raise TargetError("A model is traced before it is cut: pass a train_dataset or an eval_dataset.")
    return dataset


def first_batch(dataset: Any, collate: Callable[[list[Any]], Mapping[str, Any]], size: int) -> Mapping[str, Any]:
    """Collate the first examples of a data set that have a label.

    Args:
        dataset: Map-style, or iterable.
        collate: Makes a batch of a list of examples.
        size: Examples in the batch.

    Raises:
        TargetError: If the first 64 examples are all without a label that counts.
    """
    # Copies, for collators that take something out of an example.
    batches = (collate([copy.copy(example) for example in examples]) for examples in _windows(dataset, size))
    return _first_with_labels(batches)


def first_of_loader(loader: Iterable[Mapping[str, Any]], size: int) -> Mapping[str, Any]:
    """Return the beginning of the first batch of a data loader that begins with a label.

    Args:
        loader: Yields batches.
        size: Samples to keep of it.

    Raises:
        TargetError: If the first 64 samples or more are all without a label that counts.
    """
    return _first_with_labels(_beginning(batch, size) for batch in islice(loader, max(1, _SEARCHED // size)))


def _beginning(batch: Mapping[str, Any], size: int) -> Mapping[str, Any]:
    """Return the first samples of a batch; all of it, where it does not tell which of its values belong to which."""
    rows = {value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else None for value in batch.values()}
    return {name: value[:size] for name, value in batch.items()} if len(rows) == 1 and None not in rows else batch


def _first_with_labels(batches: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    for batch in batches:
        labels = batch.get("labels")
        if labels is None or bool((torch.as_tensor(labels) != IGNORED).any()):
            return batch
    raise TargetError(
        f"Every label of the first {_SEARCHED} examples is {IGNORED} (ignored), so there is nothing to trace the "
        "model with. Look at how the labels are made; if the data set is right, shuffle it."
    )


def _windows(dataset: Any, size: int) -> Iterator[Sequence[Any]]:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        stream = iter(dataset)
        for _ in range(_SEARCHED // size):
            if examples := list(islice(stream, size)):
                yield examples
    else:
        stop = min(_SEARCHED, len(dataset))
        yield from ([dataset[i] for i in range(start, min(start + size, stop))] for start in range(0, stop, size))


def with_own_generators(collator: Any) -> Any:
    """Copy a collator so that drawing from the copy does not advance the original's random generators."""
    copied = copy.copy(collator)
    for name, value in getattr(copied, "__dict__", {}).items():
        if isinstance(value, torch.Generator):
            setattr(copied, name, value.clone_state())
        elif isinstance(value, np.random.Generator | random.Random):
            setattr(copied, name, copy.deepcopy(value))
    return copied
