"""Kernels that are written for a GPU: layers that torch compiles, and Liger's, teach blocks what plain ones do."""

from __future__ import annotations

import pytest
import torch
from test_gpu import run
from transformers import Trainer

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HEADS = [{"head_layers": 0}, {}, {"head_bypass": "straight_through"}]


def losses(trainer):
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 6
    return torch.tensor([[value for key, value in row.items() if key.endswith("loss")] for row in rows])


def trained(folder, fields, **settings):
    return run(BlockLocalTrainer, folder, name="llama", config=BlockLocalConfig(**fields), bf16=True, **settings)


@pytest.mark.parametrize("heads", HEADS[:2])
def test_compiled_layers_teach_what_plain_ones_do(heads, tmp_path):
    plain = trained(tmp_path, {"num_blocks": 2, **heads})
    compiled = trained(tmp_path, {"num_blocks": 2, **heads}, torch_compile=True)
    assert torch.allclose(losses(compiled), losses(plain), rtol=0.02)


@pytest.mark.parametrize("heads", HEADS)
def test_ligers_kernels_teach_what_plain_ones_do(heads, tmp_path):
    pytest.importorskip("liger_kernel", exc_type=ImportError)
    plain = trained(tmp_path, {"num_blocks": 2, **heads})
    fused = trained(tmp_path, {"num_blocks": 2, **heads}, use_liger_kernel=True)
    assert torch.allclose(losses(fused), losses(plain), rtol=0.02)
    assert "liger" in fused.model.model.norm.forward.__func__.__module__


def test_one_block_with_ligers_kernels_is_the_plain_trainer(tmp_path):
    pytest.importorskip("liger_kernel", exc_type=ImportError)
    settings = {"bf16": True, "use_liger_kernel": True, "name": "llama"}
    one = run(BlockLocalTrainer, tmp_path, config=BlockLocalConfig(num_blocks=1), **settings)
    plain = run(Trainer, tmp_path, **settings)
    for key, value in plain.model.state_dict().items():
        assert torch.allclose(one.model.state_dict()[key], value, rtol=1e-3, atol=1e-5), key
