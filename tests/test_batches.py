"""Processes of a chain notice that they have read different batches, whichever tensor differs."""

from __future__ import annotations

import pytest
import torch

from hf_blocklocal.parallel.batches import described, facts_of
from hf_blocklocal.parallel.stream import HEADER_BYTES
from hf_blocklocal.parallel.wire import decoded, encoded


def batch():
    return {
        "input_ids": torch.arange(12).view(2, 6),
        "attention_mask": torch.ones(2, 6, dtype=torch.bool),
        "pixel_values": torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64).bfloat16(),
        "labels": torch.tensor(1),
        "names": ["one", "two"],
    }


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "pixel_values", "labels"])
def test_other_values_of_any_tensor_show(name):
    other = batch()
    other[name] = other[name].flip(0) if other[name].dim() > 0 else other[name] + 1
    if name == "attention_mask":
        other[name] = ~other[name]
    assert facts_of(batch(), (0, 0)) == facts_of(batch(), (0, 0))
    assert facts_of(batch(), (0, 0)) != facts_of(other, (0, 0))


def test_another_shape_of_the_same_values_shows():
    other = batch() | {"input_ids": torch.arange(12).view(3, 4)}
    assert facts_of(batch(), (0, 0)) != facts_of(other, (0, 0))


def test_only_the_tensors_that_differ_are_named():
    other = batch() | {"labels": torch.tensor(2)}
    mine, theirs = facts_of(batch(), (3, 1)), facts_of(other, (3, 1))
    assert described(mine, theirs).startswith("at 3 1 a batch of labels [] with checksum ")
    assert "input_ids" not in described(mine, theirs)
    assert "input_ids" in described(mine, facts_of(batch(), (4, 0)))
    assert described(facts_of({}, (0,)), mine) == "at 0 a batch of no tensors"


def test_every_column_of_a_large_tensor_is_looked_at():
    rows = torch.zeros(64, 1024)
    for column in range(0, 1024, 37):
        other = rows.clone()
        other[:, column] = 1
        assert facts_of({"x": rows}, (0,)) != facts_of({"x": other}, (0,)), column


def test_what_is_said_of_a_batch_fits_into_a_header():
    facts = facts_of({f"a_rather_long_name_{number}": torch.ones(8, 512) for number in range(40)}, ("step", 1, 2))
    assert decoded(encoded({"facts": facts}, HEADER_BYTES))["facts"] == facts
