"""Heads come back from disk as they were, or not at all."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from hf_blocklocal.checkpoint import HEADS_NAME, load_heads_, save_heads
from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.cut.blocks import Cut
from hf_blocklocal.cut.partition import spans_from_boundaries
from hf_blocklocal.errors import HeadsMismatchError
from hf_blocklocal.feedback import build_head
from hf_blocklocal.targets.batch import Task


def cut_at(*boundaries):
    layers = tuple(f"layer.{index}" for index in range(6))
    return Cut(layers, (0,) * 6, tuple(spans_from_boundaries(6, boundaries)))


def heads_for(config, *, classes=3, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleList(
            build_head(config, Task("classes", classes), hidden_width=4, alignment="pooled")
            for _ in range(config.num_blocks - 1)
        )


CONFIG = BlockLocalConfig(boundaries=(2, 4), latent_dim=5, head_layers=0)
CUT = cut_at(2, 4)


@pytest.fixture
def folder(tmp_path):
    save_heads(tmp_path, heads=heads_for(CONFIG).state_dict(), cut=CUT)
    return tmp_path


def assert_refused(heads, folder, cut):
    """Assert that nothing is loaded, and return what is said about it."""
    before = copy.deepcopy(heads.state_dict())
    with pytest.raises(HeadsMismatchError) as error:
        load_heads_(heads, folder, cut=cut)
    assert all(torch.equal(tensor, before[name]) for name, tensor in heads.state_dict().items())
    return str(error.value)


def test_heads_come_back_to_the_bit(folder):
    heads = heads_for(CONFIG, seed=1)
    assert any(not torch.equal(a, b) for a, b in zip(heads.parameters(), heads_for(CONFIG).parameters(), strict=True))
    load_heads_(heads, folder, cut=CUT)
    assert all(torch.equal(a, b) for a, b in zip(heads.parameters(), heads_for(CONFIG).parameters(), strict=True))


def test_loading_changes_the_given_parameters_and_makes_no_new_ones(folder):
    heads = heads_for(CONFIG, seed=1)
    before = list(heads.parameters())
    load_heads_(heads, folder, cut=CUT)
    assert all(a is b for a, b in zip(heads.parameters(), before, strict=True))


def test_the_file_says_where_the_model_was_cut(folder):
    with safe_open(folder / HEADS_NAME, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["boundaries"]) == [2, 4]


def test_the_same_heads_are_written_to_the_same_bytes(folder, tmp_path):
    for number in range(5):
        save_heads(tmp_path / str(number), heads=heads_for(CONFIG).state_dict(), cut=CUT)
        assert (tmp_path / str(number) / HEADS_NAME).read_bytes() == (folder / HEADS_NAME).read_bytes()


def test_a_single_block_has_no_heads_and_a_file_that_says_so(tmp_path):
    save_heads(tmp_path, heads={}, cut=cut_at())
    load_heads_(nn.ModuleList(), tmp_path, cut=cut_at())
    assert "belong to 1 blocks with boundaries []" in assert_refused(heads_for(CONFIG), tmp_path, CUT)


def test_a_single_block_takes_the_checkpoint_of_a_plain_trainer(tmp_path):
    heads = nn.ModuleList()
    load_heads_(heads, tmp_path, cut=cut_at())
    assert len(heads) == 0


def test_a_folder_without_heads_is_refused(tmp_path):
    text = assert_refused(heads_for(CONFIG), tmp_path, CUT)
    assert text == (
        f"{tmp_path} holds no {HEADS_NAME}: it was not saved by block-local training. Start from its model weights "
        "instead of resuming, or choose another checkpoint."
    )


@pytest.mark.parametrize("boundaries", [(3,), (1, 2, 3), (2, 5), ()])
def test_heads_of_another_cut_are_refused_with_both_cuts(folder, boundaries):
    text = assert_refused(
        heads_for(BlockLocalConfig(boundaries=boundaries, head_layers=0)), folder, cut_at(*boundaries)
    )
    assert text == (
        f"The heads in {folder / HEADS_NAME} belong to 3 blocks with boundaries [2, 4], but this run has "
        f"{len(boundaries) + 1} blocks with boundaries {list(boundaries)}. Use the options of "
        "that run with boundaries=[2, 4], and neither num_blocks nor balance, or train on from the model weights "
        "alone."
    )


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder):
    text = assert_refused(heads_for(BlockLocalConfig(boundaries=(2, 4), latent_dim=7, head_layers=0)), folder, CUT)
    assert text == (
        f"The heads in {folder / HEADS_NAME} do not fit: 0.feedback.table.weight has shape (3, 5) in the file and "
        "(3, 7) here. They were made for another model, or with another latent_dim."
    )


def test_nothing_is_loaded_where_only_the_last_tensor_does_not_fit(folder):
    heads = heads_for(CONFIG, seed=1)
    heads[1].readout.norm = nn.LayerNorm(9)
    assert "1.readout.norm.bias has shape (4,) in the file and (9,) here" in assert_refused(heads, folder, CUT)


def test_heads_of_another_kind_are_refused_by_the_tensor_that_is_too_many(folder):
    text = assert_refused(heads_for(BlockLocalConfig(boundaries=(2, 4), feedback="label")), folder, CUT)
    assert "0.feedback.table.weight is not in these heads" in text
    assert "use the block_local_config.json saved beside them" in text


def test_heads_of_another_kind_are_refused_by_the_tensor_that_is_missing(tmp_path):
    config = BlockLocalConfig(boundaries=(2, 4), feedback="label")
    save_heads(tmp_path, heads=heads_for(config).state_dict(), cut=CUT)
    assert "0.feedback.table.weight is not in the file" in assert_refused(heads_for(CONFIG), tmp_path, CUT)


def test_a_file_of_somebody_else_is_refused(tmp_path):
    save_file({"weight": torch.ones(1)}, tmp_path / HEADS_NAME)
    assert "belong to an unknown number of blocks with boundaries None" in assert_refused(
        heads_for(CONFIG), tmp_path, CUT
    )
