"""A block is run a second time, from a noisy input, by the model's own forward, and nobody else notices."""

from __future__ import annotations

import pytest
import torch
from test_parity import equal, examples, with_dropout
from training import accuracy, hooks_left, make, snapshot, whole_and_resumed
from transformers import AutoModelForTokenClassification, Cache
from zoo import SPECIMENS, T5, build_tiny, tokens_batch

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.errors import InputsNeededError, UnsupportedSettingError
from hf_blocklocal.teaching import denoising
from hf_blocklocal.teaching.denoising import NOISE


TWO_STACKS = {"t5", "bart", "whisper"}
NAMES = [name for name in SPECIMENS if name not in TWO_STACKS | {"albert"}]


def t5_encoder():
    """Layers that hand a position bias to each other, which the first of them makes."""
    return build_tiny("t5", AutoModelForTokenClassification, {**T5, "num_layers": 4, "num_labels": 5})


def built(name):
    if name == "t5_encoder":
        return t5_encoder(), tokens_batch(0)
    model = SPECIMENS[name].build()
    model.config.output_router_logits = False  # their loss is no part of the comparison
    return model, SPECIMENS[name].batch(0)


class Calls:
    """Notes what layers themselves are called with, behind all hooks."""

    def __init__(self, model, paths):
        self.given = {path: [] for path in paths}
        for path in paths:
            layer = model.get_submodule(path)
            layer.forward = self.noting(path, layer.forward)

    def noting(self, path, forward):
        def noted(*args, **kwargs):
            self.given[path].append((args, dict(kwargs)))
            return forward(*args, **kwargs)

        return noted

    def hidden(self, path, call):
        args, kwargs = self.given[path][call]
        return (args[0] if args else kwargs["hidden_states"]).detach()


def nothing(logits):
    return 0 * logits.sum()


def taught(assembly, model, batch, *, custom_loss=nothing, **options):
    """Run a step, in which heads teach nothing unless told otherwise; return the report and all gradients."""
    model.train()
    lesson = assembly.step.teach(
        assembly.read_targets(batch),
        scale=1 / assembly.read_targets(batch).elements,
        inputs=batch,
        backward=torch.Tensor.backward,
        learned=lambda *_: None,
        custom_loss=custom_loss,
        **{"seed": (0,), **options},
    )
    with lesson as report:
        model(**batch)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return report, found


def layers_by_hand(model, paths, calls, hidden):
    """Run layers one after the other, with the masks and other side inputs that they were given in the first run."""
    for path in paths:
        args, kwargs = calls.given[path][-2]
        # A cache holds the keys of the first run, and would be added to.
        kwargs = {key: None if isinstance(value, Cache) else value for key, value in kwargs.items()}
        if args:
            beside = (None if isinstance(value, Cache) else value for value in args[1:])
            output = model.get_submodule(path)(hidden, *beside, **kwargs)
        else:
            output = model.get_submodule(path)(**{**kwargs, "hidden_states": hidden})
        hidden = output if torch.is_tensor(output) else output[0]
    return hidden


def mean_square(difference, batch):
    mask_BS = batch.get("attention_mask")
    if mask_BS is None or mask_BS.shape != difference.shape[:2]:
        return difference.square().mean()
    return difference[mask_BS.bool()].square().mean()


@pytest.mark.parametrize("name", [*(name for name in NAMES if name != "wav2vec2"), "t5_encoder"])
def test_the_term_and_its_gradient_are_those_of_the_formula(name):
    model, batch = built(name)
    assembly = assemble(model, BlockLocalConfig(boundaries=(1, 3), denoising=100.0), batch)
    cut = assembly.cut
    calls = Calls(model, cut.layers)
    report, found = taught(assembly, model, batch)
    for block, span in enumerate(cut.spans[:-1]):
        paths = cut.layers[span.start : span.stop]
        clean, noisy = calls.hidden(paths[0], -2), calls.hidden(paths[0], -1)  # heads that borrow layers run first
        target = layers_by_hand(model, paths, calls, clean).detach()
        expected = layers_by_hand(model, paths, calls, noisy) - target
        expected = 100 * mean_square(expected, batch)
        torch.testing.assert_close(report.losses[block], expected.detach(), rtol=1e-4, atol=1e-8)
        own = {key: p for key, p in model.named_parameters() if cut.block_of_path(key) == block}
        gradients = torch.autograd.grad(expected, own.values(), allow_unused=True)
        assert any(gradient is not None and gradient.abs().max() > 1e-6 for gradient in gradients)
        for key, gradient in zip(own, gradients, strict=True):
            if gradient is not None:
                torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-6, msg=key)


def noises(assembly, model, batch, **options):
    """Return the noise that each block has seen in one step."""
    firsts = [assembly.cut.layers[span.start] for span in assembly.cut.spans[:-1]]
    calls = Calls(model, firsts)
    taught(assembly, model, batch, **options)
    for path in firsts:
        del model.get_submodule(path).forward
    return [calls.hidden(path, -1) - calls.hidden(path, -2) for path in firsts]


def test_noise_is_small_and_drawn_anew_for_every_seed_and_block():
    model, batch = built("bert")
    assembly = assemble(model, BlockLocalConfig(num_blocks=4, denoising=1.0), batch)
    first, again, other = (noises(assembly, model, batch, seed=seed) for seed in ((3, 7, 0), (3, 7, 0), (3, 7, 1)))
    for block in range(3):
        assert first[block].std().item() == pytest.approx(NOISE, rel=0.1)
        assert torch.equal(first[block], again[block])
        assert not torch.equal(first[block], other[block])
    assert not torch.allclose(first[0], first[1], atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_dropout_falls_in_the_second_run_as_in_the_first(name, monkeypatch):
    monkeypatch.setattr(denoising, "NOISE", 0.0)
    model, batch = with_dropout(name), SPECIMENS[name].batch(0)
    assembly = assemble(model, BlockLocalConfig(num_blocks=4, denoising=1.0), batch)
    report, _ = taught(assembly, model, batch)
    assert [loss.item() for loss in report.losses] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", NAMES)
def test_the_first_run_and_the_random_streams_do_not_notice(name):
    logits = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        model, batch = with_dropout(name), SPECIMENS[name].batch(0)
        assembly = assemble(model, BlockLocalConfig(num_blocks=4, denoising=weight), batch)
        model.train()
        lesson = assembly.step.teach(
            assembly.read_targets(batch),
            scale=1.0,
            inputs=batch,
            backward=torch.Tensor.backward,
            learned=lambda *_: None,
        )
        with lesson:
            outputs = model(**batch)
        logits.append((outputs.logits, outputs.loss, torch.rand(3)))
        assert all(p.requires_grad for p in model.parameters())
        assert not any("forward" in vars(layer) for layer in model.modules())
    assert all(torch.equal(first, second) for first, second in zip(*logits, strict=True))


@pytest.mark.parametrize("name", [*NAMES, "t5_encoder"])
def test_the_term_teaches_the_layers_of_its_block_alone(name):
    model, batch = built(name)
    assembly = assemble(model, BlockLocalConfig(num_blocks=4, denoising=1.0), batch)
    model.train()
    reached = []

    def note(block, report):
        reached.append({key for key, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0})
        model.zero_grad()

    lesson = assembly.step.teach(
        assembly.read_targets(batch),
        scale=1.0,
        inputs=batch,
        backward=torch.Tensor.backward,
        learned=note,
        custom_loss=nothing,
    )
    with lesson:
        model(**batch)
    for block, names in enumerate(reached):
        inside = {assembly.cut.block_of_path(key) for key in names}
        # Relative positions of DeBERTa are of block 0 and handed to all layers.
        assert inside == {block} or (name == "deberta_v2" and block == 0 and inside == {0, None})


def test_while_only_heads_learn_the_term_is_reported_and_teaches_nobody():
    model, batch = built("bert")
    assembly = assemble(model, BlockLocalConfig(num_blocks=2, denoising=1.0), batch)
    usual, gradients = taught(assembly, model, batch)
    report, found = taught(assembly, model, batch, heads_only=True)
    assert gradients
    assert not found
    assert report.losses[0].item() > 0
    torch.testing.assert_close(report.losses, usual.losses)


def test_the_term_is_added_to_the_loss_of_the_head():
    model, batch = built("bert")
    reports = []
    for weight in (0.0, 50.0):
        assembly = assemble(model, BlockLocalConfig(num_blocks=2, denoising=weight), batch)
        reports.append(taught(assembly, model, batch, custom_loss=None)[0].losses[0])
    term = taught(assembly, model, batch)[0].losses[0]
    assert term > 0.001
    torch.testing.assert_close(reports[1], reports[0] + term)


@pytest.mark.parametrize("config", [{}, {"overlap": 1}, {"feedback": "auto", "loss": "auto", "head_layers": 1}])
def test_stepping_at_once_changes_no_bit_with_denoising(config, tmp_path):
    states = []
    for step_per_block in (False, True):
        chosen = BlockLocalConfig.from_preset("kappel2023", num_blocks=4, step_per_block=step_per_block, **config)
        trainer = make("bert", tmp_path, config=chosen, max_grad_norm=0.3, gradient_accumulation_steps=2)
        trainer.train()
        states.append(snapshot(trainer))
    assert equal(*states)


@pytest.mark.parametrize("setting", [{"gradient_checkpointing": True}, {"torch_compile": True}])
def test_denoising_goes_with_checkpointing_and_compilation(setting, tmp_path, environment):
    if "torch_compile" in setting:
        setting["torch_compile_backend"] = "aot_eager"
    config = BlockLocalConfig(num_blocks=2, denoising=100.0)
    states = []
    for extra in ({}, setting):
        trainer = make("bert", tmp_path, config=config, optim="sgd", learning_rate=0.1, **extra)
        trainer.train()
        states.append(snapshot(trainer))
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-6)


def test_denoising_changes_what_is_learned_and_works_in_bf16(tmp_path, environment):
    states = []
    for weight in (0.0, 100.0):
        config = BlockLocalConfig(num_blocks=2, denoising=weight)
        trainer = make("bert", tmp_path, config=config, bf16=True, logging_steps=1)
        trainer.train()
        states.append(snapshot(trainer))
        assert not torch.is_autocast_enabled("cpu")
    assert not equal(*states)
    assert all(value.isfinite().all() for value in states[1].values())


def test_a_killed_run_of_the_preset_kappel2023_resumes_to_the_bit(tmp_path):
    config = BlockLocalConfig.from_preset("kappel2023", num_blocks=3)
    settings = {"config": config, "max_steps": 6, "save_steps": 2, "gradient_accumulation_steps": 2}
    whole, resumed = whole_and_resumed(tmp_path, killed_after=3, **settings)
    assert equal(snapshot(whole), snapshot(resumed))


def test_an_evaluation_runs_nothing_twice(tmp_path):
    config = BlockLocalConfig.from_preset("kappel2023")
    rows = examples(SPECIMENS["bert"])[:8]
    trainer = make("bert", tmp_path, config=config, eval_dataset=rows, compute_metrics=accuracy)
    trainer.train()
    calls = Calls(trainer.model, trainer.assembly.cut.layers[:1])
    trainer.evaluate()
    batches = -(-8 // trainer.args.per_device_eval_batch_size)
    assert len(calls.given[trainer.assembly.cut.layers[0]]) == batches


def test_an_encoder_decoder_is_not_denoised(tmp_path):
    with pytest.raises(UnsupportedSettingError) as error:
        make("t5", tmp_path, config=BlockLocalConfig(num_blocks=2, denoising=1.0)).train()
    assert str(error.value) == (
        "denoising needs a model with one stack of layers, and T5ForConditionalGeneration has 2: what enters the "
        "decoder has two parts. Use denoising=0."
    )


def test_without_the_inputs_nothing_can_run_again():
    model, batch = built("bert")
    assembly = assemble(model, BlockLocalConfig(head_layers=0, denoising=1.0), batch)
    targets = assembly.read_targets(batch)
    lesson = assembly.step.teach(targets, scale=1.0, backward=torch.Tensor.backward, learned=lambda *_: None)
    with pytest.raises(InputsNeededError, match=r"teach\(\.\.\., inputs=batch\), or use"), lesson:
        model(**batch)


def test_a_layer_whose_hidden_state_is_not_found_is_not_denoised(monkeypatch):
    model, batch = built("bert")
    monkeypatch.setattr("hf_blocklocal.cut.trace.given_hidden", lambda args, kwargs: None)
    with pytest.raises(
        UnsupportedSettingError, match=r"and bert\.encoder\.layer\.0 of BertForSequenceClassification is"
    ):
        assemble(model, BlockLocalConfig(denoising=1.0), batch)
    assemble(model, BlockLocalConfig(), batch)


def test_all_is_given_back_after_an_error():
    model, batch = built("bert")
    assembly = assemble(model, BlockLocalConfig(num_blocks=2, denoising=1.0), batch)

    def fail(loss):
        raise KeyError("backward")

    lesson = assembly.step.teach(
        assembly.read_targets(batch),
        scale=1.0,
        inputs=batch,
        backward=fail,
        learned=lambda *_: None,
        custom_loss=lambda logits: torch.zeros(()),  # so that the term is the first to be sent back
    )
    with pytest.raises(KeyError), lesson:
        model(**batch)
    assert all(p.requires_grad for p in model.parameters())
    assert not any("forward" in vars(layer) for layer in model.modules())
    assert not hooks_left(model)
