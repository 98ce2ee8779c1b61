"""Invariants 2 and 4 of the method, for every architecture: no gradient leaves its block, and no logit changes."""

from __future__ import annotations

import pytest
import torch
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble


NAMES = [name for name in SPECIMENS if name != "albert"]
# With a position bias that no longer requires gradient, scaled_dot_product_attention picks another kernel.
OTHER_KERNEL = {"t5": 1e-5}


def assembled(name, num_blocks):
    specimen = SPECIMENS[name]
    model, batch = specimen.build(), specimen.batch(0)
    return assemble(model, BlockLocalConfig(num_blocks=num_blocks, head_layers=0), batch), model, batch


def gradients_of_one_block(assembly, model, batch, block):
    """Run a step in which only one block sends its loss back."""
    targets = assembly.read_targets(batch)
    current = []

    def backward(loss):
        if len(current) == block:
            loss.backward()

    with assembly.step.teach(targets, scale=1.0, backward=backward, learned=lambda *done: current.append(done)):
        loss = model(**batch).loss
    if block == assembly.last:
        loss.backward()
    found = {name for name, p in assembly.module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assembly.module.zero_grad()
    return found


@pytest.mark.parametrize("num_blocks", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_loss_of_one_block_reaches_no_other(name, num_blocks):
    assembly, model, batch = assembled(name, num_blocks)
    names = {parameter: key for key, parameter in assembly.module.named_parameters()}
    mine = [{names[parameter] for parameter in block} for block in assembly.parameters]
    tied = {names[model.get_input_embeddings().weight]} if assembly.task.target == "vocabulary" else set()
    for block in range(num_blocks):
        reached = gradients_of_one_block(assembly, model, batch, block)
        assert reached, f"block {block} learned nothing"
        assert reached - tied <= mine[block]
        if block < assembly.last:
            assert any(key.startswith(f"heads.{block}.readout") for key in reached)


@pytest.mark.parametrize("name", NAMES)
def test_every_trainable_parameter_of_a_layer_belongs_to_that_layers_block(name):
    assembly, model, _ = assembled(name, 4)
    names = {parameter: key for key, parameter in model.named_parameters()}
    for block, parameters in enumerate(assembly.parameters):
        inside = {assembly.cut.block_of_path(names[p]) for p in parameters if p in names}
        assert inside <= {block, None}
    assert sum(len(block) for block in assembly.parameters) == len(list(assembly.module.parameters()))


@pytest.mark.parametrize("num_blocks", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_any_cut_leaves_the_logits_untouched(name, num_blocks):
    assembly, model, batch = assembled(name, num_blocks)
    model.train()
    with torch.enable_grad():
        plain = model(**batch)
    targets = assembly.read_targets(batch)
    with assembly.step.teach(targets, scale=1.0, backward=torch.Tensor.backward, learned=lambda *_: None):
        cut = model(**batch)
    if name in OTHER_KERNEL:
        torch.testing.assert_close(cut.logits, plain.logits, atol=OTHER_KERNEL[name], rtol=OTHER_KERNEL[name])
    else:
        assert torch.equal(cut.logits, plain.logits)
        assert torch.equal(cut.loss, plain.loss)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_survive_checkpointing_inside_blocks(name):
    assembly, model, batch = assembled(name, 2)
    if not model.supports_gradient_checkpointing:
        pytest.skip("the architecture does not support gradient checkpointing")

    def gradients():
        model.train()
        targets = assembly.read_targets(batch)
        with assembly.step.teach(targets, scale=1.0, backward=torch.Tensor.backward, learned=lambda *_: None):
            model(**batch).loss.backward()
        found = {key: p.grad.clone() for key, p in assembly.module.named_parameters() if p.grad is not None}
        assembly.module.zero_grad()
        return found

    plain = gradients()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient, rtol=1e-5, atol=1e-6)


def test_gradients_of_a_block_equal_those_of_a_hand_written_cut():
    assembly, model, batch = assembled("bert", 2)
    targets = assembly.read_targets(batch)
    with assembly.step.teach(targets, scale=0.5, backward=torch.Tensor.backward, learned=lambda *_: None):
        loss = model(**batch).loss
    loss.backward()
    ours = {key: p.grad.clone() for key, p in assembly.module.named_parameters() if p.grad is not None}
    assembly.module.zero_grad()

    hidden = model.bert.embeddings(input_ids=batch["input_ids"])
    mask = torch.where(batch["attention_mask"].bool(), 0.0, float("-inf"))[:, None, None, :]
    mask = mask.expand(-1, 1, mask.shape[-1], -1)
    for index, layer in enumerate(model.bert.encoder.layer):
        hidden = layer(hidden, attention_mask=mask)
        if index == 1:
            weights = batch["attention_mask"].unsqueeze(-1).float()
            a = assembly.heads[0].readout.linear(
                assembly.heads[0].readout.norm((hidden * weights).sum(1) / weights.sum(1))
            )
            distances = (a.unsqueeze(1) - assembly.heads[0].feedback.table.weight).square().sum(-1) / 4
            (0.5 * torch.nn.functional.cross_entropy(-distances, batch["labels"], reduction="sum")).backward()
            hidden = hidden.detach()
    logits = model.classifier(model.bert.pooler(hidden))
    torch.nn.functional.cross_entropy(logits, batch["labels"]).backward()
    theirs = {key: p.grad for key, p in assembly.module.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[key], rtol=1e-4, atol=1e-6)


def test_router_loss_of_a_block_reaches_only_its_own_routers():
    assembly, model, batch = assembled("mixtral", 2)
    model.train()
    whole = model(**batch)
    assert whole.aux_loss is not None
    assert whole.aux_loss > 0
    seen = []
    original = assembly.step._router_loss
    assembly.step._router_loss = lambda block, logits, targets: (
        seen.append(len(logits)) or original(block, logits, targets)
    )
    targets = assembly.read_targets(batch)
    with assembly.step.teach(targets, scale=1.0, backward=torch.Tensor.backward, learned=lambda *_: None):
        outputs = model(**batch)
    outputs.loss.backward()
    assert seen == [2]
    assert torch.equal(outputs.aux_loss, whole.aux_loss)
