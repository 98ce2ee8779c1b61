"""Heads that borrow layers: all of them give the gradient of backpropagation, and some still keep it in its block."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from menagerie import MENAGERIE
from test_parity import examples
from training import accuracy, hooks_left, make, snapshot
from transformers import AutoModelForSeq2SeqLM
from zoo import BART, SPECIMENS, VOCABULARY, Specimen, build_tiny, translation_batch

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.anatomy.modes import evaluation_mode
from hf_blocklocal.anatomy.signals import first_tensor
from hf_blocklocal.borrowing.shortcut import borrowed_layers
from hf_blocklocal.config.defaults import settled
from hf_blocklocal.cut.blocks import Cut, Trail
from hf_blocklocal.cut.partition import Span
from hf_blocklocal.errors import ConfigError, InputsNeededError, UnsupportedSettingError


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


def test_so_it_is_where_each_layer_is_given_something_of_its_own():
    config = BlockLocalConfig(num_blocks=4, head_layers=4)
    assert_gradients_of_backpropagation(MENAGERIE["gemma4_text"], config)


@pytest.mark.parametrize("boundaries", [(1,), (3,), (1, 3), (2, 3)])
@pytest.mark.parametrize("name", [*TWO_STACKS, *KIN])
def test_so_it_is_wherever_an_encoder_decoder_is_cut(name, boundaries):
    """Also where a block holds the end of the encoder and the start of the decoder."""
    specimen = KIN.get(name) or SPECIMENS[name]
    assert_gradients_of_backpropagation(specimen, BlockLocalConfig(boundaries=boundaries, head_layers=4))


@pytest.mark.parametrize("name", NAMES)
def test_borrowed_layers_learn_nothing(name):
    assert_blocks_teach_themselves(SPECIMENS[name], BlockLocalConfig(num_blocks=4, head_layers=1))


def assert_blocks_teach_themselves(specimen, config):
    model, batch = specimen.build(), specimen.batch(0)
    assembly = assemble(model, config, batch)
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
    config = BlockLocalConfig(boundaries=(boundary,), head_layers=1, head_bypass="skip")
    assembly = assemble(model, config, batch)
    seen = []
    with torch.no_grad():
        step, expected = assembly.step, reference(**batch).logits

        def look(block, hidden, _router_logits):
            seen.append(step.seen_by_head(block, hidden, batch, None))

        with step.boundaries.attached(look):
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


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "bert_mlm"])
def test_a_borrowed_head_is_asked_for_candidates_alone_and_answers_as_if_for_all(name):
    model, batch = SPECIMENS[name].build(), SPECIMENS[name].batch(0)
    config = BlockLocalConfig(num_blocks=2, head_layers=2, negatives=7)
    assembly = assemble(model, config, batch)
    shortcut, head = assembly.step.shortcut, assembly.heads[0]
    targets = assembly.read_targets(batch)
    ids_C = targets.candidates.ids_C
    everything = assembly.read_targets(batch, whole_vocabulary=True)
    with evaluation_mode(model), torch.no_grad():
        hidden = hidden_after(model, assembly.cut.layers[assembly.cut.spans[0].last], batch)
        some, all_of_them = (shortcut.logits(0, hidden, batch, Trail(), chosen) for chosen in (ids_C, None))
        torch.testing.assert_close(some, all_of_them[..., ids_C])
        # Importance weights by hand: a negative stands for its share of the tokens that are no target.
        distinct = everything.values.unique()
        logits_NV = all_of_them.flatten(0, 1)[everything.positions_N]
        negatives = ids_C[len(distinct) :]
        share = (logits_NV.shape[1] - len(distinct)) / 7
        partition_N = logits_NV[:, distinct].exp().sum(1) + share * logits_NV[:, negatives].exp().sum(1)
        expected_N = partition_N.log() - logits_NV.gather(1, everything.values[:, None])[:, 0]
        torch.testing.assert_close(head(some, targets), expected_N)


def test_a_model_that_adds_to_all_of_its_logits_is_asked_for_all_of_them():
    model, batch = SPECIMENS["gpt2"].build(), SPECIMENS["gpt2"].batch(0)
    bias_V = torch.linspace(-1, 1, VOCABULARY)

    def add(module, args, output):
        output.logits = output.logits + bias_V
        return output

    model.register_forward_hook(add)
    assembly = assemble(model, BlockLocalConfig(num_blocks=2, head_layers=1, negatives=3), batch)
    assert assembly.read_targets(batch).candidates.ids_C is None


def test_autocast_is_left_behind_with_the_forward_pass_of_a_head(tmp_path, environment):
    trainer = make("llama", tmp_path, bf16=True, eval_dataset=examples(SPECIMENS["llama"])[:5])
    losses = []
    for _ in range(2):  # the second run puts the forward into autocast once more
        trainer.train()
        assert not torch.is_autocast_enabled("cpu")
        losses.append(trainer.evaluate()["eval_block_0_loss"])
        assert not torch.is_autocast_enabled("cpu")
    exact = make("llama", tmp_path, eval_dataset=examples(SPECIMENS["llama"])[:5])
    exact.train()
    assert losses[0] == pytest.approx(exact.evaluate()["eval_block_0_loss"], rel=0.05)


def test_heads_that_borrow_ask_for_the_inputs():
    model, batch = SPECIMENS["bert"].build(), SPECIMENS["bert"].batch(0)
    assembly = assemble(model, BlockLocalConfig(num_blocks=2), batch)
    teach = assembly.step.teach(
        assembly.read_targets(batch), scale=1.0, backward=torch.Tensor.backward, learned=lambda *_: None
    )
    with pytest.raises(InputsNeededError, match=r"teach\(\.\.\., inputs=batch\)"), teach:
        model(**batch)


def hidden_after(model, path, batch):
    kept = []
    handle = model.get_submodule(path).register_forward_hook(lambda _m, _a, output: kept.append(first_tensor(output)))
    model(**batch)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize(
    ("options", "single_stack", "expected"),
    [
        ({}, True, 1),
        ({"num_blocks": 3}, True, 2),
        ({"num_blocks": 6}, True, 2),
        ({}, False, 1),
        ({"head_layers": 0}, True, 0),
        ({"head_layers": 5}, True, 5),
        ({"feedback": "label"}, True, 0),
        ({"family": "vmf"}, True, 0),
        ({"readout": "mlp"}, True, 0),
        ({"latent_dim": 64}, True, 0),
        ({"pooling": "first"}, True, 0),
        ({"sim": 0.5}, True, 0),
        ({"negatives": None}, True, 1),
    ],
)
def test_heads_borrow_by_themselves_unless_another_kind_is_asked_for(options, single_stack, expected):
    assert settled(BlockLocalConfig(**options), single_stack=single_stack).head_layers == expected


def test_a_checkpoint_says_how_many_layers_were_borrowed(tmp_path):
    trainer = make("bert", tmp_path)
    trainer.train()
    trainer.save_model()
    assert trainer.block_local.head_layers is None
    assert BlockLocalConfig.from_pretrained(tmp_path).head_layers == 1
