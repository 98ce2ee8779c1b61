"""With overlap, a loss teaches its own block and as many below it as were asked for, exactly and no further."""

from __future__ import annotations

import weakref

import pytest
import torch
from test_parity import equal, with_dropout
from training import hooks_left, make, snapshot, whole_and_resumed
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.errors import LossNotSentBackError, UnsupportedSettingError
from hf_blocklocal.randomness import stream_per_block
from hf_blocklocal.records.memory import ActivationMeter


# Models without trained side inputs: those of the others stay cut, as without overlap.
EXACT = ["bert", "bert_mlm", "bert_regression", "distilbert", "roberta", "gpt2", "llama", "gemma3", "opt", "vit"]


def assembled(name, overlap, *, num_blocks=4, model=None, **values):
    model = SPECIMENS[name].build() if model is None else model
    batch = SPECIMENS[name].batch(0)
    options = {"num_blocks": num_blocks, "overlap": overlap, "negatives": None, "head_layers": 0} | values
    config = BlockLocalConfig(**options)
    assembly = assemble(model, config, batch)
    model.train()
    return assembly, model, batch


def gradients(assembly):
    found = {key: p.grad.clone() for key, p in assembly.module.named_parameters() if p.grad is not None}
    assembly.module.zero_grad()
    return found


def local_gradients(assembly, model, batch, *, only=None, learned=lambda *_: None):
    """Run one step, in which only one block, if one is named, sends its loss back."""
    at = iter(range(assembly.last))

    def backward(loss, **kwargs):
        (loss if only in (None, next(at)) else 0 * loss).backward(**kwargs)

    targets = assembly.read_targets(batch)
    lesson = assembly.step.teach(
        targets, scale=1 / targets.elements, inputs=batch, backward=backward, learned=learned, seed=(5,)
    )
    with lesson:
        loss = model(**batch).loss
        (loss if only in (None, assembly.last) else 0 * loss).backward()
    return gradients(assembly)


def uncut_losses(assembly, model, batch):
    """Run the model without any cut; every block's loss keeps its way to the input."""
    targets = assembly.read_targets(batch)
    outputs = {}

    def keep(block):
        return lambda layer, args, output: outputs.update({block: output[0] if isinstance(output, tuple) else output})

    handles = [
        model.get_submodule(assembly.cut.layers[span.last]).register_forward_hook(keep(block))
        for block, span in enumerate(assembly.cut.spans[:-1])
    ]
    with stream_per_block(assembly.step.boundaries.exits, (5,), [torch.device("cpu")]):
        last = model(**batch).loss
    for handle in handles:
        handle.remove()
    heads = enumerate(assembly.heads)
    return [head(outputs[block], targets).sum() / targets.elements for block, head in heads] + [last]


def reference(assembly, model, batch, overlap):
    """Sum up what each loss says of the blocks that it may reach, from the uncut model."""
    names = {parameter: key for key, parameter in assembly.module.named_parameters()}
    totals = {}
    for block, loss in enumerate(uncut_losses(assembly, model, batch)):
        loss.backward(retain_graph=True)
        reached = {names[p] for mine in assembly.parameters[max(0, block - overlap) : block + 1] for p in mine}
        for key, gradient in gradients(assembly).items():
            if key in reached:
                totals[key] = totals.get(key, 0) + gradient
    return totals


def assert_same(found, expected, keys=None):
    for key in expected if keys is None else keys:
        torch.testing.assert_close(
            found[key], expected[key], rtol=1e-4, atol=1e-6, msg=lambda text, k=key: f"{k} {text}"
        )


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("num_blocks", [2, 4])
@pytest.mark.parametrize("name", EXACT)
def test_full_overlap_gives_the_gradient_of_the_sum_of_all_losses(name, num_blocks, dropout):
    model = with_dropout(name) if dropout else None
    assembly, model, batch = assembled(name, num_blocks - 1, num_blocks=num_blocks, model=model)
    found = local_gradients(assembly, model, batch)
    sum(uncut_losses(assembly, model, batch)).backward()
    expected = gradients(assembly)
    assert found.keys() == expected.keys()
    assert_same(found, expected)


@pytest.mark.parametrize("overlap", [1, 2])
@pytest.mark.parametrize("name", ["bert", "vit", "roberta"])  # no parameter of these is shared by two blocks
def test_some_overlap_gives_the_sum_of_the_losses_within_reach(name, overlap):
    assembly, model, batch = assembled(name, overlap)
    found = local_gradients(assembly, model, batch)
    assert_same(found, reference(assembly, model, batch, overlap))


@pytest.mark.parametrize("overlap", [0, 1, 2, 3])
@pytest.mark.parametrize("name", [name for name in SPECIMENS if name != "albert"])
def test_a_loss_reaches_its_block_and_those_right_below_and_no_other(name, overlap):
    assembly, model, batch = assembled(name, overlap)
    names = {parameter: key for key, parameter in assembly.module.named_parameters()}
    mine = [{names[parameter] for parameter in block} for block in assembly.parameters]
    tied = {names[model.get_input_embeddings().weight]} if assembly.task.target == "vocabulary" else set()
    for block in range(4):
        found = local_gradients(assembly, model, batch, only=block)
        reached = {key for key, gradient in found.items() if gradient.abs().max() > 0} - tied
        within = range(max(0, block - overlap), block + 1)
        assert reached <= set().union(*(mine[lower] for lower in within))
        for lower in within:
            layers = {key for key in mine[lower] if assembly.cut.block_of_path(key.removeprefix("model.")) == lower}
            assert reached & layers, f"the loss of block {block} does not reach block {lower}"
        assert {key for key in reached if key.startswith("heads")} <= mine[block]


@pytest.mark.parametrize("overlap", [1, 2, 3])
def test_logits_are_untouched_and_nothing_is_left_behind(overlap):
    assembly, model, batch = assembled("bert", overlap)
    plain = model(**batch)
    targets = assembly.read_targets(batch)
    with assembly.step.teach(targets, scale=1.0, backward=torch.Tensor.backward, learned=lambda *_: None):
        cut = model(**batch)
        cut.loss.backward()
    assert torch.equal(cut.logits, plain.logits)
    assert not hooks_left(model)


@pytest.mark.parametrize(
    ("overlap", "expected"), [(0, [0, 1, 2]), (1, [0, 1, 2]), (2, [0, 1, 2]), (3, [0, 1, 2]), (9, [0, 1, 2])]
)
def test_a_block_has_learned_once_the_last_loss_that_reaches_it_was_sent_back(overlap, expected):
    assembly, model, batch = assembled("bert", overlap)
    told = []
    local_gradients(assembly, model, batch, learned=lambda block, report: told.append((block, len(report.losses))))
    assert [block for block, _ in told] == expected
    assert [losses for _, losses in told] == [min(block + overlap + 1, 3) for block in expected]


class Token:
    """Something that a weak reference can watch."""


class Holding(torch.autograd.Function):
    """Does nothing, and holds a token as long as its place in the graph lives."""

    @staticmethod
    def forward(ctx, hidden, token):
        ctx.token = token
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_the_graph_of_a_block_is_freed_when_no_loss_reaches_it_any_more(overlap):
    assembly, model, batch = assembled("bert", overlap)
    graphs, alive = {}, []

    def watch(block):
        def hook(layer, args, output):
            token = Token()
            graphs[block] = weakref.ref(token)
            return Holding.apply(output, token)

        return hook

    for block, span in enumerate(assembly.cut.spans[:-1]):
        # In front of the cut, where the output still has its history.
        model.get_submodule(assembly.cut.layers[span.last]).register_forward_hook(watch(block), prepend=True)
    for index, path in enumerate(assembly.cut.layers):
        model.get_submodule(path).register_forward_pre_hook(
            lambda layer, args, index=index: alive.append(
                (assembly.cut.block_of_layer(index), sorted(b for b, graph in graphs.items() if graph() is not None))
            )
        )
    local_gradients(assembly, model, batch)
    for block, kept in alive:
        assert kept == list(range(max(0, block - overlap), block))
    assert not [block for block, graph in graphs.items() if graph() is not None]


def test_activations_of_as_many_blocks_are_kept_as_overlap():
    peaks = []
    for overlap in range(4):
        assembly, model, batch = assembled("bert", overlap)
        with ActivationMeter(assembly.module) as meter:
            local_gradients(assembly, model, batch)
        assert meter.live_bytes == 0
        peaks.append(meter.peak_bytes)
    layer = (peaks[3] - peaks[0]) / 3
    assert layer > 0
    for overlap in (1, 2, 3):
        assert peaks[overlap] - peaks[overlap - 1] == pytest.approx(layer, rel=0.5)


def test_a_layer_may_change_its_input_in_place():
    assembly, model, batch = assembled("vit", 1)
    expected = local_gradients(assembly, model, batch)

    def change(layer, args):
        args[0].mul_(1.0)

    for path in assembly.cut.layers[1:]:
        model.get_submodule(path).register_forward_pre_hook(change)
    assert_same(local_gradients(assembly, model, batch), expected)


def test_the_last_loss_must_be_sent_back_inside_the_step():
    assembly, model, batch = assembled("bert", 1)
    targets = assembly.read_targets(batch)
    lesson = assembly.step.teach(targets, scale=1.0, backward=torch.Tensor.backward, learned=lambda *_: None)
    with pytest.raises(LossNotSentBackError, match="overlap=1"), lesson:
        model(**batch)
    assert not hooks_left(model)


@pytest.mark.parametrize("head_layers", [1, 4])
@pytest.mark.parametrize("name", ["bert", "t5", "bart"])
def test_borrowed_layers_go_with_overlap(name, head_layers):
    assembly, model, batch = assembled(name, 1, head_layers=head_layers)
    for block in range(4):
        found = local_gradients(assembly, model, batch, only=block)
        reached = {key.removeprefix("model.") for key, gradient in found.items() if gradient.abs().max() > 0}
        blocks = {assembly.cut.block_of_path(key) for key in reached} - {None}
        assert blocks == set(range(max(0, block - 1), block + 1))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_lower_blocks_stay_as_they_are(tmp_path):
    model = SPECIMENS["bert"].build()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[:2].requires_grad_(False)
    trainer = make("bert", tmp_path, model=model, config=BlockLocalConfig(num_blocks=4, overlap=3))
    before = snapshot(trainer)
    trainer.train()
    after = snapshot(trainer)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert not [key for key in moved if "layer.0." in key or "layer.1." in key or "embeddings" in key]
    assert [key for key in moved if "layer.2." in key]


# ---- Through the Trainer ----


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("overlap", [1, 2, 3])
@pytest.mark.parametrize("name", ["bert", "gpt2", "bart", "mixtral"])
def test_stepping_each_block_at_once_changes_no_bit(name, overlap, accumulation, tmp_path):
    states = []
    for step_per_block in (False, True):
        config = BlockLocalConfig(num_blocks=4, overlap=overlap, step_per_block=step_per_block)
        settings = {"max_steps": 4, "max_grad_norm": 0.3, "gradient_accumulation_steps": accumulation}
        trainer = make(name, tmp_path, model=with_dropout(name), config=config, **settings)
        trainer.train()
        states.append(snapshot(trainer))
    assert equal(*states)


def test_overlap_changes_what_is_learned_except_in_the_last_block_at_first(tmp_path):
    states = []
    for overlap in (0, 1):
        config = BlockLocalConfig.from_preset("interlocking", num_blocks=4, overlap=overlap)
        trainer = make("bert", tmp_path, config=config, max_steps=1)
        trainer.train()
        states.append(snapshot(trainer))
    names = {parameter: key for key, parameter in trainer.assembly.module.named_parameters()}
    for block, parameters in enumerate(trainer.assembly.parameters):
        weights = [names[p] for p in parameters if p.dim() == 2]
        assert all(torch.equal(states[0][key], states[1][key]) for key in weights) == (block == 3)


def test_one_block_has_nobody_to_reach(tmp_path):
    states = []
    for overlap in (0, 1):
        trainer = make("bert", tmp_path, config=BlockLocalConfig(num_blocks=1, overlap=overlap))
        trainer.train()
        states.append(snapshot(trainer))
    assert equal(*states)


def test_while_heads_warm_up_the_blocks_below_the_last_stand_still(tmp_path):
    config = BlockLocalConfig(num_blocks=4, overlap=2, head_warmup_steps=3)
    trainer = make("bert", tmp_path, config=config, max_steps=3)
    before = snapshot(trainer)
    trainer.train()
    after = snapshot(trainer)
    lower = trainer.assembly.lower_weights()
    assert all(torch.equal(before[f"model.{name}"], after[f"model.{name}"]) for name in lower)


@pytest.mark.parametrize("setting", [{"gradient_checkpointing": True}, {"bf16": True}])
@pytest.mark.parametrize("name", ["bert", "mixtral", "t5"])
def test_overlap_goes_with_checkpointing_and_mixed_precision(name, setting, tmp_path):
    states = []
    for extra in ({}, setting):
        config = BlockLocalConfig(num_blocks=4, overlap=2)
        trainer = make(name, tmp_path, config=config, optim="sgd", learning_rate=0.1, max_steps=2, **extra)
        trainer.train()
        states.append(snapshot(trainer))
    tolerance = {"rtol": 0.1, "atol": 0.02} if "bf16" in setting else {"rtol": 1e-4, "atol": 1e-6}
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, **tolerance)


def test_a_loss_scaler_goes_with_overlap(tmp_path):
    states = []
    for scaled in (False, True):
        settings = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2, "max_grad_norm": 0}
        trainer = make("bert", tmp_path, config=BlockLocalConfig(num_blocks=4, overlap=2), **settings)
        if scaled:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        trainer.train()
        states.append(snapshot(trainer))
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-6)


def test_a_killed_run_resumes_to_the_bit(tmp_path):
    config = BlockLocalConfig(num_blocks=4, overlap=1)
    saving = {"config": config, "max_steps": 6, "save_steps": 2}
    whole, resumed = whole_and_resumed(tmp_path, killed_after=3, **saving)
    assert equal(snapshot(whole), snapshot(resumed))


def test_compiled_layers_are_refused(tmp_path):
    config = BlockLocalConfig(num_blocks=2, overlap=1)
    with pytest.raises(UnsupportedSettingError, match="overlap=1 and torch_compile exclude each other"):
        make("bert", tmp_path, config=config, torch_compile=True, torch_compile_backend="aot_eager").train()
