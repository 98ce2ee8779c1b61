"""A head reads from the output of its block what the block was given, and teaches the block to keep it."""

from __future__ import annotations

import pytest
import torch
from test_denoising import TWO_STACKS, Calls, nothing, taught
from test_locality import gradients_of_one_block
from test_parity import equal
from training import make, snapshot, whole_and_resumed
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.errors import HeadsMismatchError, UnsupportedSettingError
from hf_blocklocal.losses import Reconstruction
from hf_blocklocal.targets.batch import Targets, Task


NAMES = [name for name in SPECIMENS if name not in TWO_STACKS | {"albert"}]


def normalised(row):
    return (row - row.mean()) / (row.var(unbiased=False) + 1e-5).sqrt()


def reference(module, given, output, mask):
    """Write the formula down position by position."""
    errors = []
    for sample in range(given.shape[0]):
        for position in range(given.shape[1]):
            if mask is not None and not mask[sample, position]:
                continue
            row = normalised(output[sample, position]) * module.norm.weight + module.norm.bias
            guess = module.linear.weight @ row + module.linear.bias
            errors.append((guess - normalised(given[sample, position].detach())).square().mean())
    return sum(errors) / len(errors)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "wav2vec2"])  # its mask counts samples of sound
def test_the_term_and_its_gradient_are_those_of_the_formula(name):
    model, batch = SPECIMENS[name].build(), SPECIMENS[name].batch(0)
    model.config.output_router_logits = False
    assembly = assemble(model, BlockLocalConfig(num_blocks=4, reconstruction=0.5), batch)
    calls = Calls(model, assembly.cut.layers)
    outputs = {}

    def keep(block, hidden, _):
        outputs[block] = hidden

    with assembly.step.boundaries.attached(keep):
        model(**batch)
    report, found = taught(assembly, model, batch)
    for block, head in enumerate(assembly.heads):
        given = calls.hidden(assembly.cut.layers[block], 0)
        mask = batch.get("attention_mask")
        expected = 0.5 * reference(head.reconstruction, given, outputs[block], mask)
        torch.testing.assert_close(report.losses[block], expected.detach(), rtol=1e-4, atol=1e-6)
        own = {key: p for key, p in model.named_parameters() if assembly.cut.block_of_path(key) == block}
        gradients = torch.autograd.grad(
            expected, [*own.values(), *head.reconstruction.parameters()], allow_unused=True
        )
        for key, gradient in zip(own, gradients, strict=False):
            if gradient is not None:
                torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5, msg=key)
        decoders = [p.grad for p in head.reconstruction.parameters()]
        torch.testing.assert_close(decoders, list(gradients[len(own) :]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["deberta_v2", "gpt2", "llama", "t5", "vit", "wav2vec2"])
def test_a_reconstruction_teaches_its_block_and_its_head_alone(name):
    model, batch = SPECIMENS[name].build(), SPECIMENS[name].batch(0)
    assembly = assemble(model, BlockLocalConfig(num_blocks=4, head_layers=0, reconstruction=1.0), batch)
    names = {parameter: key for key, parameter in assembly.module.named_parameters()}
    tied = {names[model.get_input_embeddings().weight]} if assembly.task.target == "vocabulary" else set()
    for block in range(3):
        reached = gradients_of_one_block(assembly, model, batch, block)
        assert reached - tied <= {names[parameter] for parameter in assembly.parameters[block]}
        assert any(key.startswith(f"heads.{block}.reconstruction") for key in reached)


def test_images_with_channels_first_are_read_position_by_position():
    module = Reconstruction(6, 5, weight=2.0)
    generator = torch.Generator().manual_seed(0)
    given, output = torch.randn(2, 5, 3, 4, generator=generator), torch.randn(2, 6, 3, 4, generator=generator)
    targets = Targets(Task("classes", 3), torch.tensor([0, 1]), torch.arange(2))
    expected = reference(module, given.flatten(2).mT, output.flatten(2).mT, None)
    torch.testing.assert_close(module(output, given, targets), 2 * expected)


def test_while_only_heads_learn_the_decoder_learns_and_the_block_does_not():
    model, batch = SPECIMENS["bert"].build(), SPECIMENS["bert"].batch(0)
    assembly = assemble(model, BlockLocalConfig(num_blocks=2, reconstruction=1.0, head_layers=1), batch)
    _, found = taught(assembly, model, batch, heads_only=True, custom_loss=nothing)
    assert not found
    assert assembly.heads[0].reconstruction.linear.weight.grad.abs().max() > 0


@pytest.mark.parametrize("head_layers", [0, 1])
def test_a_decoder_learns_to_read_and_a_killed_run_resumes_to_the_bit(head_layers, tmp_path):
    config = BlockLocalConfig(num_blocks=3, reconstruction=1.0, head_layers=head_layers)
    settings = {"config": config, "max_steps": 6, "save_steps": 2, "gradient_accumulation_steps": 2}
    whole, resumed = whole_and_resumed(tmp_path, killed_after=3, **settings)
    assert equal(snapshot(whole), snapshot(resumed))
    start = snapshot(make("bert", tmp_path / "new", **settings))
    decoders = [key for key in start if ".reconstruction." in key]
    assert len(decoders) == 2 * 4
    assert all(not torch.equal(start[key], snapshot(whole)[key]) for key in decoders)


def test_heads_saved_without_a_decoder_are_refused(tmp_path):
    trainer = make("bert", tmp_path, config=BlockLocalConfig(num_blocks=2), max_steps=1)
    trainer.train()
    trainer.save_model()
    other = make("bert", tmp_path, config=BlockLocalConfig(num_blocks=2, reconstruction=1.0))
    with pytest.raises(HeadsMismatchError, match=r"reconstruction\.\S+ is not in the file"):
        other.load_heads(str(tmp_path))


def test_a_block_that_reaches_from_encoder_to_decoder_is_refused():
    model, batch = SPECIMENS["t5"].build(), SPECIMENS["t5"].batch(0)
    with pytest.raises(UnsupportedSettingError) as error:
        assemble(model, BlockLocalConfig(boundaries=(3,), reconstruction=1.0), batch)
    assert str(error.value) == (
        "reconstruction reads the input of a block from its output position by position, and block 0 (layers 0 to 2) "
        "of T5ForConditionalGeneration is given (4, 12, 16) and returns (4, 8, 16), from stack 0 to 1. Use "
        "reconstruction=0, or boundaries where lengths or stacks change."
    )
