"""In real models, side inputs learn from one block, and every parameter is stepped by one."""

from __future__ import annotations

import pytest
from test_blocks import hooks_of, reach_of_blocks
from zoo import SPECIMENS

from hf_blocklocal.anatomy.layers import find_stacks
from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.cut.blocks import Boundaries
from hf_blocklocal.cut.trace import owners_of, plan_cut, trace_layers, trace_reach


# ---- Side inputs of real models ----


def cut_model(model, batch, *boundaries):
    trace = trace_layers(model, find_stacks(model), batch)
    return Boundaries(model, plan_cut(trace, BlockLocalConfig(boundaries=boundaries)))


def reach_in(borrow, name, *boundaries):
    model, batch = borrow(name), SPECIMENS[name].batch(0)
    return reach_of_blocks(model, cut_model(model, batch, *boundaries), lambda: model(**batch).logits)


def blocks_that_reach(reached, name):
    return [block for block, found in enumerate(reached) if name in found]


@pytest.mark.parametrize(
    ("boundaries", "of_encoder", "of_decoder"), [((1, 2, 3), 0, 2), ((2,), 0, 1), ((1, 3), 0, 1), ((3,), 0, 0)]
)
def test_the_position_biases_of_t5_learn_where_their_stacks_begin(borrow, boundaries, of_encoder, of_decoder):
    reached = reach_in(borrow, "t5", *boundaries)
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert blocks_that_reach(reached, f"encoder.{bias}") == [of_encoder]
    assert blocks_that_reach(reached, f"decoder.{bias}") == [of_decoder]


@pytest.mark.parametrize("boundaries", [(1,), (2,), (1, 2, 3)])
def test_the_relative_embeddings_of_deberta_learn_where_the_stack_begins(borrow, boundaries):
    reached = reach_in(borrow, "deberta_v2", *boundaries)
    for name in ("rel_embeddings.weight", "LayerNorm.weight"):
        assert blocks_that_reach(reached, f"deberta.encoder.{name}") == [0]


def test_without_boundaries_the_whole_of_deberta_learns_from_one_loss(borrow):
    (everything,) = reach_in(borrow, "deberta_v2")
    assert {"deberta.encoder.rel_embeddings.weight", "deberta.encoder.layer.0.output.dense.weight"} <= everything


def test_the_states_of_an_encoder_are_taught_by_the_block_where_the_decoder_begins(borrow):
    # Blocks: encoder layer 0, encoder layer 1 with decoder layer 0, decoder layer 1.
    reached = reach_in(borrow, "t5", 1, 3)
    queries = "layer.0.SelfAttention.q.weight"
    assert blocks_that_reach(reached, f"encoder.block.0.{queries}") == [0]
    assert blocks_that_reach(reached, f"encoder.block.1.{queries}") == [1]
    assert blocks_that_reach(reached, "encoder.final_layer_norm.weight") == [1]
    # The last layer looks at the encoder as well, but does not teach it.
    assert blocks_that_reach(reached, "decoder.block.1.layer.1.EncDecAttention.k.weight") == [2]


# ---- Who steps what ----


def owners_in(borrow, name, *boundaries):
    model, batch = borrow(name), SPECIMENS[name].batch(0)
    cut = cut_model(model, batch, *boundaries)
    names = [key for key, _ in model.named_parameters()]
    return model, owners_of(names, cut.cut, trace_reach(model, cut, batch))


def test_the_tied_embedding_of_gpt2_belongs_to_the_last_block(borrow):
    model, owners = owners_in(borrow, "gpt2", 1, 3)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert owners["transformer.wte.weight"] == 2
    assert owners["transformer.wpe.weight"] == 0
    assert owners["transformer.ln_f.weight"] == 2


def test_an_embedding_of_its_own_belongs_to_the_first_block(borrow):
    _, owners = owners_in(borrow, "llama", 1, 3)
    assert owners["model.embed_tokens.weight"] == 0
    assert owners["lm_head.weight"] == 2


@pytest.mark.parametrize("name", ["gpt2", "t5", "deberta_v2"])
def test_layers_belong_to_their_block_and_every_parameter_to_one(borrow, name):
    model, owners = owners_in(borrow, name, 1, 3)
    assert set(owners) == {parameter for parameter, _ in model.named_parameters()}
    for stack in find_stacks(model):
        for path in stack.layers:
            inside = {block for parameter, block in owners.items() if parameter.startswith(f"{path}.")}
            assert len(inside) == 1


def test_tracing_owners_leaves_no_gradient_hook_or_mode_behind(borrow):
    model, batch = borrow("deberta_v2").train(), SPECIMENS["deberta_v2"].batch(0)
    boundaries = cut_model(model, batch, 2)
    trace_reach(model, boundaries, batch)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert sum(hooks_of(model)) == 0


def test_the_routers_of_a_block_hand_over_their_logits_once(borrow):
    model, batch = borrow("mixtral"), SPECIMENS["mixtral"].batch(0)
    routers = {f"model.layers.{index}.mlp.gate": 0 for index in range(4)}
    cut = cut_model(model, batch, 1, 3).cut
    told = []
    with Boundaries(model, cut, routers).attached(lambda _block, _hidden, logits: told.append(logits)):
        outputs = model(**batch)
    assert [len(logits) for logits in told] == [1, 2]
    # The logits that the model collects for itself come from earlier blocks without history.
    assert [logits.requires_grad for logits in outputs.router_logits] == [False, False, False, True]
