"""Weights that several blocks use have one gradient only where all blocks are in one process."""

from __future__ import annotations

import pytest
from torch import nn
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.errors import UnsupportedSettingError


@pytest.fixture
def untied_t5(borrow):
    """A T5 as its second version is: a language-model head of its own, one embedding for both stacks."""
    model = borrow("t5")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


def assembled(model, specimen, **config):
    config = BlockLocalConfig(num_blocks=2, head_layers=0, **config)
    return assemble(model, config, SPECIMENS[specimen].batch(0))


def test_what_else_is_shared_is_frozen_where_blocks_are_in_several_processes(untied_t5, caplog):
    assembly = assembled(untied_t5, "t5", block_parallel_size=2)
    assert assembly.config.tied_weights == "freeze"
    assert not untied_t5.shared.weight.requires_grad
    assert untied_t5.lm_head.weight.requires_grad
    assert "shared.weight: used by several blocks, and frozen" in caplog.text


def test_untying_that_would_leave_something_shared_is_refused(untied_t5):
    with pytest.raises(UnsupportedSettingError, match=r"several blocks use, shared\.weight.*tied_weights='freeze'"):
        assembled(untied_t5, "t5", block_parallel_size=2, tied_weights="untie")


def test_in_one_process_what_else_is_shared_learns_from_all(untied_t5):
    assert assembled(untied_t5, "t5").config.tied_weights == "add"
    assert assembled(untied_t5, "t5", tied_weights="untie").config.tied_weights == "untie"
    assert untied_t5.shared.weight.requires_grad


def test_a_head_that_is_all_that_was_shared_is_untied(borrow):
    model = borrow("gpt2")
    assert assembled(model, "gpt2", block_parallel_size=2).config.tied_weights == "untie"
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert model.transformer.wte.weight.requires_grad


def test_a_weight_that_nobody_trains_stays_tied(borrow, caplog):
    model = borrow("gpt2")
    model.lm_head.weight.requires_grad_(False)
    assert assembled(model, "gpt2", block_parallel_size=2).config.tied_weights == "freeze"
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "untied" not in caplog.text
    assert "frozen" not in caplog.text
