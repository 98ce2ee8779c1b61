"""A cut by cost counts what training a block costs, its head included, and leaves nothing behind."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.anatomy.layers import find_stacks
from hf_blocklocal.cut.trace import trace_layers
from hf_blocklocal.planning.balancing import balanced_cut, operations_of_heads


OWN, BORROWED = {"head_layers": 0}, {"head_layers": 1}
TRAINED, LENS = {"head_layers": 1, "head_copies": "trained"}, {"head_layers": 0, "head_lens": True}


def built(name):
    return SPECIMENS[name].build(), SPECIMENS[name].batch(0)


def traced(model, batch):
    return trace_layers(model, find_stacks(model, None), batch)


def costs_of_blocks(name, **values):
    """Return what each block of a cut costs as `describe` counts it, layers and head, in operations of a step."""
    model, batch = built(name)
    assembly = assemble(model, BlockLocalConfig(**values), batch)
    layers = traced(model, batch).costs
    in_layers = [3 * sum(layers[span.start : span.stop]) for span in assembly.cut.spans]
    return [cost * (1 + head) for cost, head in zip(in_layers, [*assembly.head_costs, 0], strict=True)]


@pytest.mark.parametrize("heads", [OWN, BORROWED, TRAINED, LENS, {"head_layers": 1, "reconstruction": 0.5}])
@pytest.mark.parametrize("name", ["bert", "gpt2", "bert_mlm", "vit", "t5"])
@pytest.mark.parametrize("num_blocks", [2, 3])
def test_no_cut_has_a_cheaper_costliest_block(name, heads, num_blocks):
    if name == "t5" and not {"head_lens", "reconstruction"}.isdisjoint(heads):
        pytest.skip("no lens at the end of an encoder, no reconstruction across stacks")
    model, batch = built(name)
    num_layers = len(traced(model, batch).layers)
    cuts = combinations(range(1, num_layers), num_blocks - 1)
    cheapest = min(max(costs_of_blocks(name, boundaries=cut, **heads)) for cut in cuts)
    chosen = max(costs_of_blocks(name, num_blocks=num_blocks, balance="cost", **heads))
    # Of copies that heads train, the third product is estimated.
    assert chosen == pytest.approx(cheapest, rel=0.02 if heads is TRAINED else 1e-9)


def test_a_copy_counts_as_a_layer_of_its_block():
    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 99}
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=9, num_labels=3, **sizes))
    config = BlockLocalConfig(num_blocks=2, balance="cost", head_layers=1, head_copies="trained")
    assert [len(span) for span in assemble(model, config, SPECIMENS["bert"].batch(0)).cut.spans] == [4, 5]


def test_blocks_that_run_twice_count_twice():
    own = [len(span) for span in _spans("bert", head_layers=0)]
    denoised = [len(span) for span in _spans("bert", head_layers=0, denoising=1.0)]
    assert own == [2, 2]
    assert denoised == [1, 3]


def _spans(name, **values):
    model, batch = built(name)
    return assemble(model, BlockLocalConfig(num_blocks=2, balance="cost", **values), batch).cut.spans


def test_counting_leaves_no_gradient_and_no_draw_behind():
    model, batch = built("gpt2")
    trace = traced(model, batch)
    config = BlockLocalConfig(num_blocks=2, balance="cost", head_layers=1, head_bypass="skip")
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    before = torch.random.get_rng_state()
    cut = balanced_cut(model, config, trace, batch)
    assert torch.equal(before, torch.random.get_rng_state())
    assert cut == balanced_cut(model, config, trace, batch)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted


def test_heads_without_a_target_cost_nothing():
    model, batch = built("bert_mlm")
    trace = traced(model, batch)
    silent = batch | {"labels": torch.full_like(batch["labels"], -100)}
    config = BlockLocalConfig(num_blocks=2, balance="cost", head_layers=0)
    assert operations_of_heads(model, config, trace, silent) == [0.0] * len(trace.layers)
    assert operations_of_heads(model, config, trace, batch)[0] > 0
