"""Taking a batch to trace with leaves data, collators and random streams as they were."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from hf_blocklocal.errors import TargetError
from hf_blocklocal.randomness import random_state_kept
from hf_blocklocal.targets.probe import first_batch, with_own_generators


def collate(examples):
    return {"labels": torch.tensor([example["labels"] for example in examples])}


class Stream(IterableDataset):
    def __init__(self, labels):
        self.labels = labels

    def __iter__(self):
        return iter({"labels": label} for label in self.labels)

    def __len__(self):
        return len(self.labels)


@pytest.mark.parametrize("kind", [Stream, lambda labels: [{"labels": label} for label in labels]])
def test_the_first_examples_with_a_label_are_taken(kind):
    assert first_batch(kind([3, 4, 5]), collate, 2)["labels"].tolist() == [3, 4]
    assert first_batch(kind([-100, -100, -100, 7, 8]), collate, 2)["labels"].tolist() == [-100, 7]
    assert first_batch(kind([9]), collate, 2)["labels"].tolist() == [9]


@pytest.mark.parametrize("kind", [Stream, lambda labels: [{"labels": label} for label in labels]])
def test_data_without_a_label_is_refused(kind):
    with pytest.raises(TargetError, match="Every label of the first 64 examples is -100"):
        first_batch(kind([-100] * 65), collate, 2)


def test_the_generators_of_a_collator_are_not_advanced():
    class Collator:
        def __init__(self):
            self.numpy, self.torch = np.random.default_rng(0), torch.Generator().manual_seed(0)

        def draw(self):
            return self.numpy.random(), torch.rand((), generator=self.torch).item()

    collator = Collator()
    drawn_from_copy = with_own_generators(collator).draw()
    assert collator.draw() == drawn_from_copy
    assert collator.draw() != drawn_from_copy


def test_random_streams_are_given_back_even_after_an_error():
    def draws():
        return random.random(), np.random.rand(), torch.rand(()).item()

    def fail():
        draws()
        raise KeyError

    with random_state_kept():
        first = draws()
    with pytest.raises(KeyError), random_state_kept():
        fail()
    assert draws() == first
