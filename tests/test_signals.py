"""What layers hand on is found and changed in whatever it is wrapped."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from hf_blocklocal.anatomy.signals import first_tensor, map_tensors


Pair = namedtuple("Pair", "left right")


def test_a_function_reaches_every_tensor_in_tuples_and_lists_and_nothing_else():
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    mapped = map_tensors((one, [two, "text", None], Pair(one, 3)), lambda tensor: 10 * tensor)
    assert mapped == (10, [20, "text", None], Pair(10, 3))
    assert isinstance(mapped[2], Pair)


def test_sequences_are_built_anew():
    inner = [torch.tensor(1.0)]
    outer = (inner,)
    assert map_tensors(outer, torch.neg) == ([-1],)
    assert outer == ([1],)


def test_mappings_are_changed_in_place():
    states = {"key": torch.tensor(1.0), "more": {"value": torch.tensor(2.0)}, "count": 3}
    assert map_tensors(states, torch.neg) is states
    assert states == {"key": -1, "more": {"value": -2}, "count": 3}


def test_an_output_of_transformers_is_a_mapping():
    output = BaseModelOutput(last_hidden_state=torch.ones(2, requires_grad=True).exp(), hidden_states=None)
    assert map_tensors(output, torch.Tensor.detach) is output
    assert not output.last_hidden_state.requires_grad
    assert not output[0].requires_grad


def test_a_function_that_returns_nothing_leaves_its_tensors_alone():
    seen, tensor = [], torch.tensor(1.0)
    mapped = map_tensors([tensor, (tensor,)], seen.append)
    assert len(seen) == 2
    assert mapped[0] is tensor
    assert mapped[1][0] is tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda hidden: hidden,
        lambda hidden: (hidden, torch.zeros(1)),
        lambda hidden: [hidden, None],
        lambda hidden: Pair(hidden, torch.zeros(1)),
        lambda hidden: OrderedDict(anything=hidden, other=torch.zeros(1)),
        lambda hidden: BaseModelOutput(last_hidden_state=hidden),
    ],
    ids=["tensor", "tuple", "list", "named tuple", "mapping", "model output"],
)
def test_the_hidden_state_is_the_first_of_what_a_layer_returns(wrap):
    hidden = torch.ones(2, 3)
    assert first_tensor(wrap(hidden)) is hidden
