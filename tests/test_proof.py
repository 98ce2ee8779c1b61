"""A model is only spread over processes if each block by itself gives what it gives inside the whole."""

from __future__ import annotations

import pytest
import torch
from menagerie import GEMMA_4, MENAGERIE, build_usual
from test_stage import NAMES
from zoo import CONTINUE, SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.cut.needs import trace_needs
from hf_blocklocal.errors import SplitError, UnsupportedSettingError
from hf_blocklocal.parallel.proof import check_block_alone
from hf_blocklocal.parallel.stage import unneeded_here
from hf_blocklocal.parallel.uses import check_heads_look_up, used_by_heads


def checked(model, batch, *blocks, num_blocks=2, also_gone=()):
    """Check blocks of a model by themselves; return the outputs that the last of them cannot tell."""
    config = BlockLocalConfig(num_blocks=num_blocks, head_layers=0, tied_weights="freeze")
    assembly = assemble(model, config, batch)
    boundaries = assembly.step.boundaries
    needs = trace_needs(model, boundaries, batch)
    for block in blocks:
        gone = unneeded_here(model, boundaries, block, needs) | set(also_gone)
        unknown = check_block_alone(
            model, boundaries, block, needs=needs, forms=assembly.forms, gone=gone, inputs=batch
        )
    return unknown


@pytest.mark.parametrize("name", NAMES)
def test_blocks_that_know_of_others_by_messages_alone_pass(name):
    specimen = SPECIMENS[name]
    checked(specimen.build(), specimen.batch(0), *range(4), num_blocks=4)


def test_a_model_that_moves_tokens_to_where_its_embedding_is_passes():
    specimen = MENAGERIE["llama4_text"]
    checked(specimen.build(), specimen.batch(0), *range(4), num_blocks=4)


def test_the_check_leaves_the_model_as_it_was(borrow):
    model, batch = borrow("gpt2").train(), SPECIMENS["gpt2"].batch(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters, random_state = list(model.parameters()), torch.get_rng_state()
    checked(model, batch, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in model.modules())


def with_a_hidden_channel(model, write, read, *, takes):
    """Let the first layer of a BERT leave something behind, and the last one use it, past all arguments."""
    first, last = model.bert.encoder.layer[0], model.bert.encoder.layer[3]
    forward_of_first, forward_of_last, store = first.forward, last.forward, {}

    def leave(hidden, *args, **kwargs):
        store["note"] = write(hidden.detach())
        return forward_of_first(hidden, *args, **kwargs)

    def use(hidden, *args, **kwargs):
        note = store.pop("note") if takes else store["note"]
        return forward_of_last(read(hidden, note), *args, **kwargs)

    first.forward, last.forward = leave, use
    return model


CHANNELS = {
    "a spread": (lambda hidden: hidden.abs().mean(), lambda hidden, note: hidden + note),
    "a choice of tokens": (
        lambda hidden: hidden.norm(dim=-1).argmax(dim=-1),
        lambda hidden, note: hidden * torch.nn.functional.one_hot(note, hidden.shape[1])[..., None],
    ),
}


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize(
    ("takes", "what"), [(True, "fails with KeyError: 'note'"), (False, r"returns as l\w+ something else: .* apart")]
)
def test_a_layer_that_reads_what_one_of_another_block_left_behind_is_refused(channel, takes, what, borrow):
    """Even if an earlier run has left the same there."""
    model = with_a_hidden_channel(borrow("bert"), *CHANNELS[channel], takes=takes)
    batch = SPECIMENS["bert"].batch(0)
    assert checked(model, batch, 0) == ()
    with pytest.raises(SplitError, match=rf"Block 1 of BertFor.* {what}.*block_parallel_size=1"):
        checked(model, batch, 1)


def test_a_weight_that_will_be_gone_and_is_used_is_noticed(borrow):
    with pytest.raises(SplitError, match="Block 0 of BertFor"):
        checked(borrow("bert"), SPECIMENS["bert"].batch(0), 0, also_gone=["bert.embeddings.LayerNorm.weight"])


@pytest.mark.parametrize("shared", [0, 2])
def test_layers_that_are_given_parts_of_an_embedding_or_share_keys_and_values_are_refused(shared):
    """Gemma 4. Gemma 3n is refused before, wherever its blocks are."""
    specimen = MENAGERIE["gemma4_text"]
    layers = {"num_kv_shared_layers": shared, "layer_types": ["sliding_attention", "full_attention"] * 2}
    model = build_usual("gemma4_text", CONTINUE, GEMMA_4 | {"global_head_dim": 8} | layers)
    with pytest.raises((SplitError, UnsupportedSettingError), match="block_parallel_size=1"):
        checked(model, specimen.batch(0), 1)


def test_the_states_of_an_encoder_are_not_known_where_the_decoder_is(borrow):
    batch = SPECIMENS["t5"].batch(0)
    assert checked(borrow("t5"), batch, 3, num_blocks=4) == ("encoder_last_hidden_state",)
    assert checked(borrow("t5"), batch, 1) == ()  # there the states of the encoder are what has arrived


# ---- Heads ----


def borrowing(name, num_blocks, frozen=()):
    specimen = SPECIMENS[name]
    model, batch = specimen.build(), specimen.batch(0)
    for weight in frozen:
        model.get_parameter(weight).requires_grad_(False)
    assembly = assemble(model, BlockLocalConfig(num_blocks=num_blocks, head_layers=1, tied_weights="freeze"), batch)
    return assembly, used_by_heads(assembly, batch)


@pytest.mark.parametrize("name", ["bert", "distilbert", "deberta_v2", "gpt2", "llama", "mixtral", "vit", "t5", "bart"])
def test_heads_use_what_later_blocks_train(name):
    assembly, used = borrowing(name, 4)
    check_heads_look_up(assembly, used)
    assert all(any(assembly.owners[weight] > block for weight in names) for block, names in enumerate(used))


def test_a_head_that_uses_what_an_earlier_block_trains_is_refused():
    assembly, used = borrowing("bert", 4)
    lower = "bert.embeddings.word_embeddings.weight"
    with pytest.raises(UnsupportedSettingError, match=rf"head of block 1 of Bert.*{lower}, which"):
        check_heads_look_up(assembly, [used[0], used[1] | {lower}, used[2]])
    frozen, _ = borrowing("bert", 4, frozen=[lower])
    check_heads_look_up(frozen, [used[0], used[1] | {lower}, used[2]])
