"""Models of stages, each of which changes the shape of what it is given: no head can leave one of them out."""

from __future__ import annotations

import pytest
import torch
from test_parity import arguments
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer, assemble
from hf_blocklocal.errors import UnsupportedSettingError


MODELS = {
    "convnext": (ConvNextForImageClassification, ConvNextConfig, {"hidden_sizes": [8, 16, 24, 32]}),
    "resnet": (ResNetForImageClassification, ResNetConfig, {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32]}),
    "swin": (
        SwinForImageClassification,
        SwinConfig,
        {"image_size": 64, "patch_size": 2, "embed_dim": 8, "num_heads": [1, 1, 1, 1], "window_size": 2},
    ),
}


def build(name):
    kind, config, sizes = MODELS[name]
    torch.manual_seed(0)
    model = kind(config(depths=[1, 1, 1, 1], num_labels=3, **sizes))
    assert model.num_parameters() < 100_000
    return model


def batch():
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(4, 3, 64, 64, generator=generator), "labels": torch.tensor([0, 1, 2, 0])}


@pytest.mark.parametrize("num_blocks", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_by_default_their_blocks_have_heads_of_their_own(name, num_blocks, tmp_path):
    rows = [{key: value[row] for key, value in batch().items()} for row in range(4)]
    config = BlockLocalConfig(num_blocks=num_blocks)
    trainer = BlockLocalTrainer(build(name), arguments(tmp_path, max_steps=2), train_dataset=rows, block_local=config)
    before = {key: value.clone() for key, value in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.assembly.config.head_layers == 0
    assert all(
        any(not torch.equal(value, before[key]) for key, value in trainer.model.named_parameters() if value in mine)
        for mine in map(set, trainer.assembly.parameters)
    )


@pytest.mark.parametrize("name", MODELS)
def test_heads_that_would_leave_stages_out_are_refused_and_whole_ones_are_not(name):
    with pytest.raises(UnsupportedSettingError, match=r"head of block 0 cannot leave out .*head_layers=0.*=3\)"):
        assemble(build(name), BlockLocalConfig(num_blocks=4, head_layers=1), batch())
    assembly = assemble(build(name), BlockLocalConfig(num_blocks=4, head_layers=3), batch())
    assert assembly.config.head_layers == 3
