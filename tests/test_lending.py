"""What is borrowed from a running model is given back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_blocklocal.anatomy.lending import replaced_tensors


def test_other_weights_and_statistics_stand_in_wherever_they_are_used():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2, bias=False))
    model[2].weight = model[0].weight
    model.eval()
    own = model.state_dict(keep_vars=True)
    weight, mean = nn.Parameter(2 * torch.eye(2)), torch.tensor([1.0, 2.0])
    stand_ins = {model[0].weight: weight, model[1].running_mean: mean}
    x = torch.tensor([[1.0, 1.0]])
    with replaced_tensors(model, stand_ins):
        torch.testing.assert_close(model(x), 2 * (2 * x - mean), rtol=0, atol=1e-4)
        assert set(model.parameters()) == {weight}
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), replaced_tensors(model, stand_ins):
        model(x.T)
    assert all(model.state_dict(keep_vars=True)[name] is tensor for name, tensor in own.items())
