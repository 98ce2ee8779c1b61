"""A chain of feedback networks: each carries the message from above one block down, and learns from its own block."""

# Shapes: N targets, C classes or candidates, Z units of the latent.

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from test_locality import gradients_of_one_block
from test_parity import equal, examples
from torch.nn import functional as F
from training import make, snapshot, whole_and_resumed
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.checkpoint import HEADS_NAME
from hf_blocklocal.errors import TargetError


Z = 6


def chained(name, num_blocks=4, **values):
    batch = SPECIMENS[name].batch(0)
    config = BlockLocalConfig(num_blocks=num_blocks, feedback="chained", latent_dim=Z, negatives=20, **values)
    model = SPECIMENS[name].build()
    return assemble(model, config, batch), model, batch


def normal(rows):
    mean, variance = rows.mean(-1, keepdim=True), rows.var(-1, unbiased=False, keepdim=True)
    return (rows - mean) / (variance + 1e-5).sqrt()


@pytest.mark.parametrize("name", ["bert", "bert_tokens", "gpt2", "t5"])
def test_messages_and_gradients_are_those_of_a_chain_written_by_hand(name):
    assembly, model, batch = chained(name)
    targets = assembly.read_targets(batch)
    forward = {}
    for block, head in enumerate(assembly.heads):
        head.readout.register_forward_hook(lambda _, __, output, block=block: forward.update({block: output.detach()}))
    lesson = assembly.step.teach(targets, scale=0.5, backward=torch.Tensor.backward, learned=lambda *_: None)
    with lesson:
        model(**batch)

    lowest, middle, highest = (head.feedback for head in assembly.heads)
    weights = [net.weight.detach().clone().requires_grad_() for net in (lowest.map, middle.map, highest.table)]
    if targets.candidates is None:
        top_CZ, log_weights_C = weights[2], 0.0
    else:
        embed_CE, log_weights_C = targets.candidates.embeddings_CE, targets.candidates.log_weights_C
        top_CZ = normal(embed_CE) @ weights[2].T
    middle_CZ = normal(top_CZ.detach()) @ weights[1].T
    lowest_CZ = normal(middle_CZ.detach()) @ weights[0].T
    for block, message_CZ in enumerate((lowest_CZ, middle_CZ, top_CZ)):
        a_NZ = forward[block]
        if len(a_NZ) != len(targets):
            a_NZ = a_NZ[targets.samples_N]
        distances_NC = (a_NZ.unsqueeze(1) - message_CZ).square().sum(-1) / 4
        loss = F.cross_entropy(log_weights_C - distances_NC, targets.values, reduction="sum") * 0.5
        torch.testing.assert_close(assembly.heads[block].feedback(targets), message_CZ, rtol=1e-4, atol=1e-6)
        (expected,) = torch.autograd.grad(loss, weights[block])
        found = (lowest.map, middle.map, highest.table)[block].weight.grad
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert expected.abs().max() > 1e-4


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_a_loss_teaches_its_own_map_and_no_other(name):
    assembly, model, batch = chained(name)
    for block in range(assembly.last):
        reached = gradients_of_one_block(assembly, model, batch, block)
        learned = {key for key in reached if ".feedback." in key}
        assert learned == {f"heads.{block}.feedback.{'table' if block == 2 else 'map'}.weight"}
        assert not [key for key in reached if key.startswith("heads.") and not key.startswith(f"heads.{block}.")]


def test_every_map_belongs_to_its_own_block_and_is_counted_once():
    assembly, _, _ = chained("bert")
    maps = [key for key in assembly.heads.state_dict() if "feedback" in key]
    assert maps == ["0.feedback.map.weight", "1.feedback.map.weight", "2.feedback.table.weight"]
    for head, block in zip(assembly.heads, assembly.parameters, strict=False):
        (weight,) = head.feedback.parameters()
        assert [sum(parameter is weight for parameter in other) for other in assembly.parameters].count(1) == 1
        assert any(parameter is weight for parameter in block)
    assert "ChainedFeedback" in assembly.describe()


def test_copied_heads_listen_to_copies():
    assembly, _, batch = chained("bert")
    heads, targets = copy.deepcopy(assembly.heads), assembly.read_targets(batch)
    assert heads[0].feedback.above is heads[1].feedback
    assert heads[1].feedback.above is heads[2].feedback
    before = assembly.heads[0].feedback(targets)
    with torch.no_grad():
        heads[2].feedback.table.weight.normal_(generator=torch.Generator().manual_seed(5))
    assert not torch.allclose(heads[0].feedback(targets), before)
    assert torch.equal(assembly.heads[0].feedback(targets), before)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_with_a_single_head_the_chain_is_direct_feedback(name, tmp_path):
    states = []
    for feedback in ("direct", "chained"):
        trainer = make(name, tmp_path, config=BlockLocalConfig(num_blocks=2, feedback=feedback))
        trainer.train()
        states.append(snapshot(trainer))
    assert equal(*states)


def test_messages_of_classes_have_about_the_same_length_all_along_the_chain():
    batch = SPECIMENS["bert_tokens"].batch(0)
    config = BlockLocalConfig(num_blocks=4, feedback="chained", latent_dim=256)
    assembly = assemble(SPECIMENS["bert_tokens"].build(), config, batch)
    for head in assembly.heads:
        lengths_C = head.feedback(assembly.read_targets(batch)).norm(dim=1)
        assert ((lengths_C > 0.8) & (lengths_C < 1.2)).all()


# ---- Through the Trainer ----


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_stepping_each_block_at_once_changes_no_bit(name, accumulation, overlap, tmp_path):
    states = []
    for at_once in (False, True):
        config = BlockLocalConfig(num_blocks=4, feedback="chained", step_per_block=at_once, overlap=overlap)
        settings = {"max_steps": 5, "gradient_accumulation_steps": accumulation, "max_grad_norm": 0.3}
        trainer = make(name, tmp_path, config=config, **settings)
        before = snapshot(trainer)
        trainer.train()
        states.append(snapshot(trainer))
    assert equal(*states)
    maps = [key for key in before if ".feedback." in key]
    assert len(maps) == 3
    assert not any(torch.equal(before[key], states[0][key]) for key in maps)


@pytest.mark.parametrize("step_per_block", [False, True])
def test_a_killed_run_resumes_to_the_bit(step_per_block, tmp_path):
    config = BlockLocalConfig(
        num_blocks=4, feedback="chained", feedback_learning_rate=0.01, step_per_block=step_per_block
    )
    whole, resumed = whole_and_resumed(tmp_path, killed_after=6, config=config, max_steps=9, save_steps=4)
    assert equal(snapshot(whole), snapshot(resumed))
    saved = load_file(tmp_path / "whole" / "checkpoint-9" / HEADS_NAME)
    assert sorted(key for key in saved if "feedback" in key) == [
        "0.feedback.map.weight",
        "1.feedback.map.weight",
        "2.feedback.table.weight",
    ]


def test_saved_heads_are_loaded_into_a_chain_that_holds(tmp_path):
    config = BlockLocalConfig(num_blocks=4, feedback="chained")
    rows = examples(SPECIMENS["bert"])[:8]
    trainer = make("bert", tmp_path, config=config, learning_rate=0.01, eval_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    again = make("bert", tmp_path, config=config, model=trainer.model, eval_dataset=rows)
    again.load_heads(tmp_path / "saved")
    metrics, expected = again.evaluate(), trainer.evaluate()
    assert metrics["eval_block_0_loss"] == expected["eval_block_0_loss"]
    assert again.assembly.heads[0].feedback.above is again.assembly.heads[1].feedback


@pytest.mark.parametrize("name", ["bert_multilabel", "bert_regression"])
def test_a_chain_cannot_carry_targets_that_cannot_be_counted(name, tmp_path):
    config = BlockLocalConfig(num_blocks=4, feedback="chained")
    with pytest.raises(TargetError, match="feedback='chained' cannot carry .* needs a finite set"):
        make(name, tmp_path, config=config).train()


def test_a_chain_learns_in_bf16(tmp_path):
    config = BlockLocalConfig(num_blocks=4, feedback="chained")
    trainer = make("bert", tmp_path, config=config, bf16=True)
    before = snapshot(trainer)
    trainer.train()
    after = snapshot(trainer)
    assert not [key for key in after if ".feedback." in key and torch.equal(before[key], after[key])]
