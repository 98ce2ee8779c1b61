"""Heads that run every layer above a block and send gradients straight past those that they do not borrow."""

from __future__ import annotations

import pytest
import torch
from test_parity import examples
from test_shortcut import TWO_STACKS, assert_blocks_teach_themselves, gradients_of
from training import make
from transformers import SwinConfig, SwinForImageClassification
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble, early_exit, truncate
from hf_blocklocal.anatomy.signals import first_tensor
from hf_blocklocal.checkpoint import save_heads
from hf_blocklocal.config.defaults import settled
from hf_blocklocal.depth import measure_depths
from hf_blocklocal.depth.opening import open_trained
from hf_blocklocal.errors import ConfigError, UnsupportedSettingError


def straight_through(**options):
    return BlockLocalConfig(head_layers=1, head_bypass="straight_through", **options)


def seen_by_heads(model, batch, config, **options):
    """Return what each head is given, in a forward pass without dropout."""
    assembly = assemble(model, config, batch)
    seen = []

    def look(block, hidden, _router_logits):
        seen.append(assembly.step.seen_by_head(block, hidden, batch, None, **options))

    with torch.no_grad(), assembly.step.boundaries.attached(look):
        expected = model.eval()(**batch).logits
    return seen, expected


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "gemma3", "vit", *TWO_STACKS])
def test_such_a_head_predicts_what_the_model_does(name, borrow):
    seen, expected = seen_by_heads(borrow(name), SPECIMENS[name].batch(0), straight_through(num_blocks=4))
    assert len(seen) == 3
    for logits in seen:
        torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_in_evaluations_the_layers_are_left_out_all_the_same(name, borrow):
    batch = SPECIMENS[name].batch(0)
    without, expected = seen_by_heads(borrow(name), batch, straight_through(num_blocks=4), shortened=True)
    skipping, _ = seen_by_heads(borrow(name), batch, BlockLocalConfig(num_blocks=4, head_layers=1, head_bypass="skip"))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(without, skipping, strict=True))
    assert not torch.allclose(without[0], expected)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_gradients_pass_the_other_layers_unchanged(name):
    """At the end of block 0 arrives what the model's own loss sends to the input of the layer that is borrowed."""
    model, batch = SPECIMENS[name].build(), SPECIMENS[name].batch(0)
    assembly = assemble(model, straight_through(num_blocks=2, negatives=None), batch)
    layers = [model.get_submodule(path) for path in assembly.cut.layers]
    found = {}

    def keep(module, args, output):
        first_tensor(output).register_hook(lambda gradient: found.setdefault(module, gradient))

    model.train()
    handles = [layers[1].register_forward_hook(keep)]
    gradients_of(assembly, model, batch)
    handles[0].remove()
    arrived = found.pop(layers[1])
    handles = [layers[2].register_forward_hook(keep)]
    model(**batch).loss.backward()
    handles[0].remove()
    torch.testing.assert_close(arrived, found[layers[2]], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["bert", *TWO_STACKS])
def test_layers_that_are_passed_learn_nothing(name):
    assert_blocks_teach_themselves(SPECIMENS[name], straight_through(num_blocks=4))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_nothing_of_the_layers_that_are_passed_is_kept_for_a_backward_pass(name):
    def kept(bypass):
        model, batch = SPECIMENS[name].build(), SPECIMENS[name].batch(0)
        assembly = assemble(model, BlockLocalConfig(boundaries=(1,), head_layers=1, head_bypass=bypass), batch)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            gradients_of(assembly, model.train(), batch)
        return sum(sizes)

    assert kept("straight_through") == kept("skip")


def test_the_forward_pass_of_all_layers_counts_as_a_cost_of_the_head(borrow):
    costs = {
        bypass: assemble(
            borrow("bert"),
            BlockLocalConfig(boundaries=(1,), head_layers=1, head_bypass=bypass),
            SPECIMENS["bert"].batch(0),
        ).head_costs[0]
        for bypass in ("skip", "straight_through")
    }
    # Of three layers above one, two are passed: a forward pass each, beside the three passes of the block.
    assert costs["straight_through"] == pytest.approx(costs["skip"] + 2 / 3, rel=0.05)


def test_copies_are_of_all_layers_above():
    model, batch = SPECIMENS["bert"].build(), SPECIMENS["bert"].batch(0)
    assembly = assemble(model, straight_through(num_blocks=2, head_refresh_steps=2), batch)
    above = {key for key, _ in model.named_parameters() if assembly.cut.block_of_path(key) == 1}
    assert above <= assembly.lent[0]


def test_it_is_the_default_of_an_encoder_decoder_whose_blocks_are_together(tmp_path):
    trainer = make("t5", tmp_path, eval_dataset=examples(SPECIMENS["t5"])[:5])
    trainer.train()
    assert "through layers 3, straight past the others" in trainer.assembly.describe()
    assert 0 < trainer.evaluate()["eval_block_0_loss"] < float("inf")
    trainer.save_model()
    saved = BlockLocalConfig.from_pretrained(tmp_path)
    assert (saved.head_layers, saved.head_bypass) == (1, "straight_through")


@pytest.mark.parametrize(
    ("options", "single_stack", "expected"),
    [
        ({}, True, (1, "skip")),
        ({}, False, (1, "straight_through")),
        ({"num_blocks": 4}, False, (2, "straight_through")),
        ({"head_bypass": "skip"}, False, (1, "skip")),
        ({"head_bypass": "straight_through"}, True, (1, "straight_through")),
        ({"head_layers": 0}, False, (0, "skip")),
        ({"feedback": "label"}, False, (0, "skip")),
        ({"block_parallel_size": 2}, False, (2, "skip")),
        ({"placement": "devices"}, False, (2, "skip")),
    ],
)
def test_what_is_left_open_depends_on_the_model_and_on_where_blocks_are(options, single_stack, expected):
    config = settled(BlockLocalConfig(**{"num_blocks": 2} | options), single_stack=single_stack)
    assert (config.head_layers, config.head_bypass) == expected


@pytest.mark.parametrize("apart", [{"block_parallel_size": 2}, {"placement": "devices"}, {"head_copies": "trained"}])
def test_heads_train_a_copy_of_a_decoder_that_is_elsewhere_and_keep_what_it_has_learned(apart):
    config = settled(BlockLocalConfig(num_blocks=2, head_bypass="skip", **apart), single_stack=False)
    assert (config.head_copies, config.head_refresh_steps, config.head_refresh_lag) == ("trained", 0, 0)


def test_layers_that_change_the_shape_cannot_be_passed():
    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 1, 1], window_size=2, num_labels=3
    )
    model, batch = SwinForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}
    batch["labels"] = torch.tensor([0, 1])
    with pytest.raises(UnsupportedSettingError, match=r"SwinForImageClassification makes \(.*\) of \(.*\)"):
        assemble(model, BlockLocalConfig(num_blocks=2, head_bypass="straight_through"), batch)


def test_stacks_that_cannot_lend_have_heads_of_their_own():
    model, batch = SPECIMENS["t5"].build(), SPECIMENS["t5"].batch(0)
    model.config.is_encoder_decoder = False
    assert assemble(model, BlockLocalConfig(num_blocks=2), batch).config.head_layers == 0


def test_a_model_that_was_trained_apart_is_opened_with_the_heads_that_it_had(tmp_path):
    model, batch = SPECIMENS["t5"].build(), SPECIMENS["t5"].batch(0)
    trained = assemble(model, BlockLocalConfig(num_blocks=2, head_bypass="skip", head_lens=True), batch)
    save_heads(tmp_path, heads=trained.heads.state_dict(), cut=trained.cut)
    config = BlockLocalConfig(num_blocks=2, head_lens=True, block_parallel_size=2)
    opened = open_trained(model, config=config, heads=tmp_path, inputs=batch)
    assert (opened.assembly.config.head_layers, opened.assembly.config.head_bypass) == (2, "skip")
    assert opened.never_refreshed


def test_whoever_asks_heads_for_copies_that_are_gone_is_warned(caplog):
    model, batch = SPECIMENS["bert"].build(), SPECIMENS["bert"].batch(0)
    refreshed, apart = (
        assemble(model, BlockLocalConfig(num_blocks=2, head_copies="trained", head_refresh_steps=steps), batch)
        for steps in (5, 0)
    )
    truncate(refreshed, 1)
    truncate(apart, 2)
    assert "copies of their own" not in caplog.text
    truncate(apart, 1)
    assert "copies of their own" in caplog.text


def test_whoever_asks_heads_to_do_without_the_layers_they_learned_with_is_warned(caplog):
    model, batch = SPECIMENS["bert"].build(), SPECIMENS["bert"].batch(0)
    past, skipping = (
        assemble(model, BlockLocalConfig(boundaries=(2, 3), head_layers=1, head_bypass=bypass), batch)
        for bypass in ("straight_through", "skip")
    )
    early_exit(skipping)
    truncate(skipping, 1)
    measure_depths(open_trained(skipping), [batch], count=False)
    truncate(past, 2)  # its head borrows all that lies above
    truncate(past, 1, keep_borrowed=False, calibration=[batch], steps=1)
    assert "leave out" not in caplog.text
    early_exit(past)
    truncate(past, 1)
    measure_depths(open_trained(past), [batch], count=False)
    said = [record.getMessage() for record in caplog.records if "leave out" in record.getMessage()]
    assert [text.split(" leave out")[0] for text in said] == [
        "Early exits",
        "Smaller models",
        "Smaller models with what their heads borrow",
    ]
    assert all("straight_through', block 0): expect poor" in text and "head_bypass='skip'" in text for text in said)


def test_a_single_block_has_no_heads_to_settle():
    config = BlockLocalConfig(num_blocks=1, head_bypass="straight_through")
    assert settled(config, single_stack=True) == config


def test_what_it_cannot_be_combined_with_is_named():
    with pytest.raises(ConfigError, match="head_bypass='straight_through' and feedback='label' exclude each other"):
        settled(BlockLocalConfig(head_bypass="straight_through", feedback="label"), single_stack=True)
    with pytest.raises(ConfigError, match="head_bypass='straight_through' and head_layers=0 exclude each other"):
        BlockLocalConfig(head_layers=0, head_bypass="straight_through")
    with pytest.raises(ConfigError, match="and block_parallel_size=2 exclude each other"):
        BlockLocalConfig(num_blocks=2, block_parallel_size=2, head_bypass="straight_through")
    with pytest.raises(ConfigError, match="head_bypass='around' is not known"):
        BlockLocalConfig(head_bypass="around")
