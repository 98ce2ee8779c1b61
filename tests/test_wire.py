"""What is taken apart comes together again, and what cannot travel is refused by name."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

from hf_blocklocal.errors import UnsupportedSettingError
from hf_blocklocal.parallel.wire import TensorForm, decoded, encoded, put_together, take_apart


def test_nested_values_come_together_again():
    value = (torch.ones(2, 3), None, [1, 2.5, "x", True], {"bias": torch.arange(3), "shape": (4, 5)})
    description, tensors = take_apart(value)
    arrived = put_together(decoded(encoded({"value": description}, 512))["value"], tensors)
    assert type(arrived) is tuple
    assert type(arrived[2]) is list
    assert type(arrived[3]["shape"]) is tuple
    assert arrived[0] is value[0]
    assert arrived[3]["bias"] is value[3]["bias"]
    assert arrived[1:3] == value[1:3]
    assert arrived[3]["shape"] == (4, 5)


@pytest.mark.parametrize("value", [object(), OrderedDict(a=1), {1: 2}, (torch.ones(1), {2, 3})])
def test_what_cannot_travel_is_refused_by_name(value):
    with pytest.raises(UnsupportedSettingError, match="cannot be sent to another process"):
        take_apart(value)


def test_a_header_that_is_too_long_is_refused():
    with pytest.raises(UnsupportedSettingError, match="more than the 16"):
        encoded({"value": "x" * 20}, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_form_makes_a_tensor_to_receive_into(dtype):
    tensor = torch.zeros(2, 0, 3, dtype=dtype)
    empty = TensorForm.of(tensor).empty(torch.device("cpu"))
    assert (empty.dtype, empty.shape) == (dtype, tensor.shape)
