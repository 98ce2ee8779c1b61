"""A lens starts as the identity, learns with its block, and lets the model's own task head read any block."""

from __future__ import annotations

import pytest
import torch
from test_parity import equal
from test_shortcut import assert_gradients_of_backpropagation
from training import make, snapshot, whole_and_resumed
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.errors import UnsupportedSettingError
from hf_blocklocal.feedback import Lens


WIDTH = 16


def disturb_(lens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lens.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return lens


def seen_by(assembly, model, batch):
    """Return what each block has put out, and what its head was given."""
    hidden_seen = []
    step = assembly.step

    def look(block, hidden, _router_logits):
        hidden_seen.append((hidden, step.seen_by_head(block, hidden, batch, None)))

    with torch.no_grad(), step.boundaries.attached(look):
        model(**batch)
    return hidden_seen


@pytest.mark.parametrize("shape", [(2, 3, WIDTH), (2, WIDTH, 3, 5)])
def test_a_lens_adds_an_affine_map_that_is_zero_at_first(shape):
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    lens = Lens(WIDTH)
    assert torch.equal(lens(hidden), hidden)
    disturb_(lens)
    rows = hidden if len(shape) == 3 else hidden.permute(0, 2, 3, 1)
    expected = rows + rows @ lens.linear.weight.T + lens.linear.bias
    torch.testing.assert_close(lens(hidden), expected if len(shape) == 3 else expected.permute(0, 3, 1, 2))


def test_a_lens_keeps_the_precision_of_what_it_is_given():
    assert disturb_(Lens(WIDTH))(torch.ones(2, 3, WIDTH, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "bart"])
def test_at_first_all_layers_above_give_the_gradient_of_backpropagation(name):
    assert_gradients_of_backpropagation(SPECIMENS[name], BlockLocalConfig(head_layers=4, head_lens=True))


def test_without_layers_the_final_norm_and_the_task_head_read_the_block(borrow):
    model, batch = borrow("gpt2").eval(), SPECIMENS["gpt2"].batch(0)
    assembly = assemble(model, BlockLocalConfig(num_blocks=4, head_layers=0, head_lens=True), batch)
    lenses = [disturb_(head.lens, block) for block, head in enumerate(assembly.heads)]
    for lens, (hidden, logits) in zip(lenses, seen_by(assembly, model, batch), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(logits, model.lm_head(model.transformer.ln_f(lens(hidden))))


def test_a_lens_stands_before_the_borrowed_layers(borrow):
    model, batch = borrow("bert").eval(), SPECIMENS["bert"].batch(0)
    assembly = assemble(model, BlockLocalConfig(boundaries=(3,), head_layers=1, head_lens=True), batch)
    lens = disturb_(assembly.heads[0].lens)
    ((_, logits),) = seen_by(assembly, model, batch)
    handle = model.bert.encoder.layer[2].register_forward_hook(lambda layer, args, output: lens(output))
    with torch.no_grad():
        torch.testing.assert_close(logits, model(**batch).logits)
    handle.remove()


@pytest.mark.parametrize("head_layers", [0, 1])
@pytest.mark.parametrize("name", ["bert_mlm", "gpt2", "llama", "vit"])
def test_the_loss_of_a_block_teaches_the_block_and_its_lens_alone(name, head_layers):
    model, batch = SPECIMENS[name].build(), SPECIMENS[name].batch(0)
    assembly = assemble(model, BlockLocalConfig(num_blocks=4, head_layers=head_layers, head_lens=True), batch)
    model.train()
    learned = []

    def note(block, report):
        learned.append({key for key, p in assembly.module.named_parameters() if p.grad is not None})
        assembly.module.zero_grad()

    targets = assembly.read_targets(batch)
    with assembly.step.teach(targets, scale=1.0, inputs=batch, backward=torch.Tensor.backward, learned=note):
        model(**batch)
    for block, names in enumerate(learned):
        assert {key for key in names if key.startswith("heads")} == {
            f"heads.{block}.lens.linear.weight",
            f"heads.{block}.lens.linear.bias",
        }
        inside = {assembly.cut.block_of_path(key.removeprefix("model.")) for key in names}
        assert inside - {None} == {block}
        lens = set(assembly.heads[block].parameters())
        assert lens <= set(assembly.parameters[block])
        assert sum(parameter.numel() for parameter in lens) == WIDTH * (WIDTH + 1)


@pytest.mark.parametrize(
    ("name", "boundaries"), [("bert", (1, 2, 3)), ("gpt2", (1, 2)), ("bart", (1, 3)), ("t5", (1, 3))]
)
def test_in_a_warm_up_only_lenses_learn(name, boundaries, tmp_path):
    """Also where a block in the decoder sees the encoder states that the same block has made."""
    config = BlockLocalConfig(boundaries=boundaries, head_layers=1, head_lens=True, head_warmup_steps=2)
    trainer = make(name, tmp_path, config=config, max_steps=2, learning_rate=1e-2)
    before = snapshot(trainer)
    trainer.train()
    moved = {key for key, value in snapshot(trainer).items() if not torch.equal(value, before[key])}
    names = {parameter: key for key, parameter in trainer.assembly.module.named_parameters()}
    lower = {names[parameter] for block in trainer.assembly.parameters[:-1] for parameter in block}
    lenses = {key for key in before if ".lens." in key}
    assert len(lenses) == 2 * len(boundaries)
    assert moved & lower == lenses


def test_in_a_warm_up_a_tied_embedding_learns_from_the_last_block_alone():
    model, batch = SPECIMENS["gpt2"].build(), SPECIMENS["gpt2"].batch(0)
    assembly = assemble(model.train(), BlockLocalConfig(num_blocks=2, head_layers=0, head_lens=True), batch)
    lesson = assembly.step.teach(
        assembly.read_targets(batch),
        scale=1.0,
        inputs=batch,
        backward=torch.Tensor.backward,
        learned=lambda *_: None,
        heads_only=True,
    )
    with lesson:
        model(**batch)
    assert {key for key, p in assembly.module.named_parameters() if p.grad is not None} == {
        "heads.0.lens.linear.weight",
        "heads.0.lens.linear.bias",
    }


def test_a_lens_is_saved_and_resumed_to_the_bit(tmp_path):
    config = BlockLocalConfig(num_blocks=3, head_layers=0, head_lens=True, step_per_block=True)
    whole, resumed = whole_and_resumed(tmp_path, killed_after=6, config=config, max_steps=9, save_steps=4)
    assert equal(snapshot(whole), snapshot(resumed))
    assert resumed.assembly.heads[0].lens.linear.weight.abs().max() > 0
    assert "through a lens\n" in resumed.assembly.describe()


def test_copies_go_with_a_lens(tmp_path):
    states = []
    for every in (1, 0):
        config = BlockLocalConfig(num_blocks=2, head_layers=0, head_lens=True, head_refresh_steps=every)
        trainer = make("bert", tmp_path, config=config, learning_rate=1e-2)
        trainer.train()
        states.append(snapshot(trainer))
    assert not equal(*states)


def test_an_encoder_needs_a_decoder_layer_that_reads_it():
    model, batch = SPECIMENS["t5"].build(), SPECIMENS["t5"].batch(0)
    with pytest.raises(UnsupportedSettingError, match="ends in the encoder of T5ForConditionalGeneration"):
        assemble(model, BlockLocalConfig(num_blocks=2, head_layers=0, head_lens=True), batch)
    assemble(model, BlockLocalConfig(boundaries=(3,), head_layers=0, head_lens=True), batch)
