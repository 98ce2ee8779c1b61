"""A batch that is made up leads to the same cut and the same heads as one from the data."""

from __future__ import annotations

import pytest
import torch
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.anatomy.example import example_batch
from hf_blocklocal.errors import InputsNeededError


SHARED = {"albert"}
CONFIG = BlockLocalConfig(num_blocks=2, head_layers=0)


@pytest.mark.parametrize("name", [name for name in SPECIMENS if name not in SHARED])
def test_heads_and_cut_are_those_of_a_real_batch(name, borrow):
    real, made_up = (assemble(borrow(name), CONFIG, batch) for batch in batches(name, borrow(name)))
    assert made_up.task == real.task
    assert made_up.cut == real.cut
    shapes = [{key: value.shape for key, value in side.heads.state_dict().items()} for side in (made_up, real)]
    assert shapes[0] == shapes[1]


def batches(name, model):
    return SPECIMENS[name].batch(0), example_batch(model)


def test_a_model_without_a_task_needs_a_real_batch(borrow):
    with pytest.raises(InputsNeededError, match="for BertModel, because its task is not known"):
        example_batch(borrow("bert").bert)


def test_no_token_of_a_text_is_a_special_one(borrow):
    model = borrow("roberta")
    words = example_batch(model)["input_ids"][:, :-1].flatten().tolist()
    assert len(set(words)) > 1
    assert not {model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id} & set(words)


def test_the_random_stream_is_left_alone(borrow):
    model = borrow("vit")
    before = torch.get_rng_state()
    example_batch(model)
    assert torch.equal(torch.get_rng_state(), before)
