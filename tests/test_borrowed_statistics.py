"""Running statistics, as batch norms keep them, are moved by the model's own forward pass alone."""

from __future__ import annotations

import pytest
import torch
from menagerie import MENAGERIE
from torch import nn

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.anatomy.lending import statistics_kept, statistics_of


RESNET = MENAGERIE["resnet"]


def assembled(**config):
    model = RESNET.build()
    assembly = assemble(model, BlockLocalConfig(num_blocks=2, **config), RESNET.batch(0))
    return model, assembly


def statistics(model):
    return {
        f"{path}.{name}": tensor.clone()
        for path, module in model.named_modules()
        for name, tensor in statistics_of(module).items()
    }


def teach(assembly, batch):
    model = assembly.module.model.train()
    targets = assembly.read_targets(batch)
    assembly.begin_step(0)
    lesson = assembly.step.teach(
        targets, scale=1.0, inputs=batch, backward=torch.Tensor.backward, learned=lambda *_: None, seed=(0,)
    )
    with lesson:
        model(**batch).loss.backward()


@pytest.mark.parametrize(
    "config",
    [
        {"head_layers": 1},
        {"head_layers": 1, "head_refresh_steps": 2, "head_refresh_lag": 1},
        {"head_layers": 0, "denoising": 0.5},
    ],
    ids=["live", "copies", "denoising"],
)
def test_heads_and_second_runs_leave_statistics_elsewhere_alone(config):
    model, assembly = assembled(**config)
    plain = RESNET.build().train()
    plain(**RESNET.batch(1))
    teach(assembly, RESNET.batch(1))
    expected, found = statistics(plain), statistics(model)
    assert len(expected) > 10
    of_block_0 = [name for name in expected if assembly.cut.block_of_path(name) == 0]
    for name, tensor in expected.items():
        if "denoising" not in config or name not in of_block_0:
            assert torch.equal(found[name], tensor), name


def test_copies_take_statistics_with_them():
    model, assembly = assembled(head_layers=1, head_refresh_steps=2, head_refresh_lag=1, head_refresh_decay=0.0)
    before = statistics(model)
    teach(assembly, RESNET.batch(1))
    moved = next(name for name in before if name.startswith(f"{assembly.cut.layers[1]}.") and "mean" in name)
    path, _, leaf = moved.rpartition(".")
    with assembly.copies.in_use(0):
        assert torch.equal(model.get_submodule(path)._buffers[leaf], before[moved])
    assert not torch.equal(model.get_submodule(path)._buffers[leaf], before[moved])
    assembly.begin_step(1)
    assembly.begin_step(2)
    now = statistics(model)
    with assembly.copies.in_use(0):
        assert torch.equal(model.get_submodule(path)._buffers[leaf], now[moved])


def test_statistics_are_given_back_after_an_error():
    norm = nn.BatchNorm1d(3).train()
    own = norm.running_mean
    with pytest.raises(ValueError, match="more than 1 value"), statistics_kept([norm]):
        norm(torch.randn(4, 3)).sum() + norm(torch.randn(1, 3)).sum()
    assert norm.running_mean is own
    assert not own.any()
    assert norm.num_batches_tracked == 0
