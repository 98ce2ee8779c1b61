"""Blocks one after the other, each in a model of its own of which the rest is gone, learn what they learn together."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.anatomy.lending import replaced_tensors
from hf_blocklocal.cut.blocks import EndOfBlock
from hf_blocklocal.cut.needs import trace_needs
from hf_blocklocal.parallel.stage import Stage, let_go_, unneeded_here


# Shared layers cannot be cut; a loss that balances experts is over all layers, and a process has those of one block.
NAMES = [name for name, specimen in SPECIMENS.items() if specimen.layers >= 4 and name not in ("albert", "mixtral")]


def assembled(name, num_blocks):
    specimen = SPECIMENS[name]
    config = BlockLocalConfig(num_blocks=num_blocks, head_layers=0, tied_weights="freeze")
    model = specimen.build()
    return assemble(model, config, specimen.batch(0)), specimen.batch(1)


def taught(assembly, batch):
    """Teach all blocks that are here; return the gradients by name and the losses."""
    model = assembly.module.model.train()
    targets = assembly.read_targets(batch)
    lesson = assembly.step.teach(
        targets, scale=1.0, inputs=batch, backward=torch.Tensor.backward, learned=lambda *_: None, seed=(0,)
    )
    with lesson as report, suppress(EndOfBlock):
        loss = model(**batch).loss
        loss.backward()
        report.losses.append(loss.detach())
    gradients = {key: p.grad for key, p in assembly.module.named_parameters() if p.grad is not None}
    return gradients, report.losses


def staged(name, num_blocks, block, given):
    """Return an assembly of which only one block is here, and what it will hand on."""
    assembly, batch = assembled(name, num_blocks)
    model, boundaries = assembly.module.model, assembly.step.boundaries
    needs = trace_needs(model, boundaries, batch)
    gone = unneeded_here(model, boundaries, block, needs)
    # Heads over a vocabulary look at the embedding of the targets.
    lent = set().union(*assembly.lent)
    let_go_([p for key, p in model.named_parameters() if key in gone - lent])
    sent = []
    boundaries.station = Stage(
        model, boundaries, block, needs=needs, forms=assembly.forms, receive=lambda: given, send=sent.append
    )
    return assembly, batch, sent


@pytest.mark.parametrize("num_blocks", [4])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_by_themselves_learn_what_they_learn_together(name, num_blocks):
    whole, batch = assembled(name, num_blocks)
    expected, losses = taught(whole, batch)
    given, found = None, {}
    for block in range(num_blocks):
        assembly, batch, sent = staged(name, num_blocks, block, given)
        gradients, (loss,) = taught(assembly, batch)
        assert torch.equal(loss, losses[block])
        assert not gradients.keys() & found.keys()
        found |= gradients
        assert len(sent) == (block < num_blocks - 1)
        given = sent[0] if sent else None
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert torch.equal(found[key], gradient), key


@pytest.mark.parametrize("name", NAMES)
def test_a_block_that_is_lent_the_others_runs_the_whole_model(name):
    whole, batch = assembled(name, 4)
    expected = whole.module.model.eval()(**batch)
    assembly, batch, sent = staged(name, 4, 3, None)
    model, boundaries = assembly.module.model.eval(), assembly.step.boundaries
    lent = dict(whole.module.model.named_parameters())
    stand_ins = {parameter: lent[key] for key, parameter in model.named_parameters() if parameter.is_meta}
    assert len(stand_ins) > 0
    with boundaries.attached(lambda *_: None), replaced_tensors(model, stand_ins), boundaries.suspended():
        outputs = model(**batch)
    assert torch.equal(outputs.logits, expected.logits)
    assert not sent
    assert all(parameter.is_meta for parameter in stand_ins)
    assert set(stand_ins) <= set(model.parameters())


def test_what_is_gone_takes_no_memory_and_keeps_its_name():
    assembly, _, _ = staged("bert", 2, 1, None)
    model = assembly.module.model
    gone = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert {name.split(".")[3] for name in gone if ".layer." in name} == {"0", "1"}
    assert "bert.embeddings.word_embeddings.weight" in gone
    assert model.state_dict().keys() == SPECIMENS["bert"].build().state_dict().keys()
