"""Heads that borrow layers: all of them give the gradient of backpropagation, and some still keep it in its block."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_parity import examples
from test_trainer import accuracy, hooks_left, make, snapshot
from transformers import AutoModelForSeq2SeqLM
from zoo import BART, SPECIMENS, Specimen, build_tiny, translation_batch

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.blocks import Cut
from hf_blocklocal.errors import ConfigError, UnsupportedSettingError
from hf_blocklocal.partition import Span
from hf_blocklocal.shortcut import borrowed_layers


TWO_STACKS = ["t5", "bart", "whisper"]
NAMES = [name for name in SPECIMENS if name != "albert"]
KIN = {
    name: Specimen(name, partial(build_tiny, name, AutoModelForSeq2SeqLM, BART), translation_batch, 4, "vocabulary")
    for name in ("mbart", "marian")
}
# The agreement of Gaussian messages is a quarter of the squared error.
FACTOR = {"bert_regression": 4}


def gradients_of(assembly, model, batch):
    targets = assembly.read_targets(batch)
    teach = assembly.step.teach(
        targets, scale=1 / targets.elements, inputs=batch, backward=torch.Tensor.backward, learned=lambda *_: None
    )
    with teach:
        model(**batch).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("block", "count", "layers"), [(0, 1, (7,)), (0, 2, (4, 7)), (0, 99, (2, 3, 4, 5, 6, 7)), (1, 3, (3, 5, 7))]
)
def test_borrowed_layers_are_evenly_spread_and_end_with_the_last(block, count, layers):
    cut = Cut(tuple("abcdefgh"), (0,) * 8, (Span(0, 2), Span(2, 3), Span(3, 8)))
    assert borrowed_layers(cut, block, count) == layers


def assert_gradients_of_backpropagation(specimen, config):
    model, batch = specimen.build(), specimen.batch(0)
    model.config.output_router_logits = False
    assembly = assemble(model, config, batch)
    model.train()
    model(**batch).loss.backward()
    whole = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ours = gradients_of(assembly, model, batch)
    for key, gradient in whole.items():
        block = assembly.cut.block_of_path(key)
        if block is not None:  # a tied embedding gets a share from every block
            factor = FACTOR.get(specimen.name, 1) if block < assembly.last else 1
            torch.testing.assert_close(factor * ours[key], gradient, rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize("num_blocks", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_with_all_layers_above_the_gradient_is_that_of_backpropagation(name, num_blocks):
    assert_gradients_of_backpropagation(SPECIMENS[name], BlockLocalConfig(num_blocks=num_blocks, head_layers=4))


@pytest.mark.parametrize("boundaries", [(1,), (3,), (1, 3), (2, 3)])
@pytest.mark.parametrize("name", [*TWO_STACKS, *KIN])
def test_so_it_is_wherever_an_encoder_decoder_is_cut(name, boundaries):
    """Also where a block holds the end of the encoder and the start of the decoder."""
    specimen = KIN.get(name) or SPECIMENS[name]
    assert_gradients_of_backpropagation(specimen, BlockLocalConfig(boundaries=boundaries, head_layers=4))


@pytest.mark.parametrize("name", NAMES)
def test_borrowed_layers_learn_nothing(name):
    model, batch = SPECIMENS[name].build(), SPECIMENS[name].batch(0)
    assembly = assemble(model, BlockLocalConfig(num_blocks=4, head_layers=1), batch)
    model.train()
    trainable = [p.requires_grad for p in model.parameters()]
    learned = []
    targets = assembly.read_targets(batch)

    def note(block, report):
        learned.append({key for key, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()

    with assembly.step.teach(targets, scale=1.0, inputs=batch, backward=torch.Tensor.backward, learned=note):
        model(**batch)
    for block, names in enumerate(learned):
        assert {assembly.cut.block_of_path(key) for key in names} <= {block, None}
        assert any(assembly.cut.block_of_path(key) == block for key in names)
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert not any("forward" in vars(layer) for layer in model.modules())


def test_a_head_that_borrows_everything_predicts_what_the_model_does(tmp_path):
    config = BlockLocalConfig(num_blocks=2, head_layers=4)
    trainer = make(
        "bert", tmp_path, config=config, eval_dataset=examples(SPECIMENS["bert"])[:11], compute_metrics=accuracy
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_block_0_accuracy"] == pytest.approx(metrics["eval_accuracy"])


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_stepping_at_once_changes_no_bit_with_borrowed_layers(name, tmp_path):
    states = []
    for step_per_block in (False, True):
        config = BlockLocalConfig(num_blocks=4, head_layers=1, step_per_block=step_per_block)
        trainer = make(name, tmp_path, config=config, max_steps=3, max_grad_norm=0.3)
        trainer.train()
        states.append(snapshot(trainer))
    # Stepped at once, a block is ahead of those above it, which are read before they step either way.
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("setting", [{"gradient_checkpointing": True}, {"torch_compile": True}])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_borrowed_layers_go_with_checkpointing_and_compilation(name, setting, tmp_path):
    if "torch_compile" in setting:
        setting = setting | {"torch_compile_backend": "aot_eager"}
    config = BlockLocalConfig(num_blocks=2, head_layers=1)
    states = []
    for extra in ({}, setting):
        trainer = make(name, tmp_path, config=config, optim="sgd", learning_rate=0.1, **extra)
        trainer.train()
        states.append(snapshot(trainer))
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def silenced(model, paths):
    """Take from layers of a T5 what they add to their input; the position bias that they return stays."""
    for path in paths:
        for name, weight in model.get_submodule(path).named_parameters():
            if name.endswith((".o.weight", ".wo.weight")):
                weight.zero_()
    return model


@pytest.mark.parametrize(
    ("boundary", "left_out"),
    [(1, ["encoder.block.1", "decoder.block.0"]), (2, ["decoder.block.0"])],
)
def test_left_out_layers_hand_on_the_position_bias(boundary, left_out, borrow):
    batch = SPECIMENS["t5"].batch(0)
    model, reference = borrow("t5").eval(), silenced(borrow("t5"), left_out).eval()
    assembly = assemble(model, BlockLocalConfig(boundaries=(boundary,), head_layers=1), batch)
    seen = []
    with torch.no_grad():
        step, expected = assembly.step, reference(**batch).logits
        with step.boundaries.attached(lambda block, hidden, _: seen.append(step.seen_by_head(block, hidden, batch))):
            model(**batch)
    torch.testing.assert_close(seen[0], expected)
    assert not torch.allclose(expected, borrow("t5").eval()(**batch).logits)


@pytest.mark.parametrize("name", TWO_STACKS)
def test_one_decoder_layer_teaches_the_encoder(name, tmp_path):
    config = BlockLocalConfig(num_blocks=4, head_layers=1)
    trainer = make(name, tmp_path, config=config, learning_rate=1e-2, eval_dataset=examples(SPECIMENS[name])[:5])
    before = snapshot(trainer)
    trainer.train()
    after = snapshot(trainer)
    for path in trainer.assembly.cut.layers:
        names = [key for key in before if key.startswith(f"model.{path}.")]
        assert any(not torch.equal(before[key], after[key]) for key in names), path
    metrics = trainer.evaluate()
    assert all(0 < metrics[f"eval_block_{block}_loss"] < float("inf") for block in range(3))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_decoder_inputs_may_be_given_or_made_from_the_labels(name):
    gradients = []
    for given in (False, True):
        model, batch = SPECIMENS[name].build(), SPECIMENS[name].batch(0)
        if given:
            batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        assembly = assemble(model, BlockLocalConfig(num_blocks=4, head_layers=2), batch)
        gradients.append(gradients_of(assembly, model.train(), batch))
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])


def test_two_stacks_that_are_no_encoder_and_decoder_cannot_lend_layers():
    model, batch = SPECIMENS["t5"].build(), SPECIMENS["t5"].batch(0)
    model.config.is_encoder_decoder = False
    with pytest.raises(UnsupportedSettingError, match="T5ForConditionalGeneration has 2 stacks"):
        assemble(model, BlockLocalConfig(num_blocks=2, head_layers=1), batch)


def test_borrowed_layers_exclude_direct_feedback():
    with pytest.raises(ConfigError, match="exclude each other"):
        BlockLocalConfig(head_layers=1, feedback="direct")
    with pytest.raises(ConfigError, match="at least 0"):
        BlockLocalConfig(head_layers=-1)


def test_forwards_and_gradients_are_given_back_after_an_error():
    model, batch = SPECIMENS["bert"].build(), SPECIMENS["bert"].batch(0)
    assembly = assemble(model, BlockLocalConfig(num_blocks=2, head_layers=1), batch)

    def fail(loss):
        raise KeyError("backward")

    teach = assembly.step.teach(
        assembly.read_targets(batch), scale=1.0, inputs=batch, backward=fail, learned=lambda *_: None
    )
    with pytest.raises(KeyError), teach:
        model(**batch)
    assert all(p.requires_grad for p in model.parameters())
    assert not any("forward" in vars(layer) for layer in model.modules())
    assert not hooks_left(model)
