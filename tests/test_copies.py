"""Heads borrow copies of the layers above: taken when they are due, as old as asked for, kept over a resume."""

from __future__ import annotations

import pytest
import torch
from test_optim import three_blocks
from test_parity import equal
from test_shortcut import assert_gradients_of_backpropagation
from training import make, snapshot, whole_and_resumed
from transformers import TrainerCallback
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.borrowing.copies import COPIES_NAME, Copies
from hf_blocklocal.errors import CopiesMismatchError, UnsupportedSettingError


LENT = [{"1.weight", "1.bias", "2.weight"}, {"2.weight"}]


def borrowed(copies, model, block=0):
    with copies.in_use(block):
        return {name: model.get_parameter(name).clone() for name in LENT[block]}


def live(model, block=0):
    return {name: model.get_parameter(name).clone() for name in LENT[block]}


def move(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def close(first, second):
    return all(torch.allclose(first[name], second[name], atol=1e-6) for name in second)


# ---- When copies are taken ----


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("lag", [0, 1, 2, 5])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_at_multiples_of_the_period_the_weights_of_lag_steps_before_come_into_use(every, lag, decay):
    model = three_blocks()
    copies = Copies(model, LENT, every=every, lag=lag, decay=decay)
    after = [live(model)]
    expected = after[0]
    for step in range(12):
        if step % every == 0:
            taken = after[max(0, step - lag)]
            expected = {name: decay * old + (1 - decay) * taken[name] for name, old in expected.items()}
        for _ in range(2):  # micro-batches
            copies.advance_(step)
        assert close(borrowed(copies, model), expected), step
        assert len(copies._waiting) <= -(-lag // every)
        move(model, step)
        after.append(live(model))


def test_without_a_period_the_weights_of_the_start_stay():
    model = three_blocks()
    start = live(model)
    copies = Copies(model, LENT, every=0)
    for step in range(4):
        copies.advance_(step)
        move(model, step)
        assert equal(borrowed(copies, model), start)


def test_each_block_borrows_its_own_and_the_model_gets_its_weights_back():
    model = three_blocks()
    copies, own = Copies(model, LENT, every=0), dict(model.named_parameters())
    move(model, 0)
    with copies.in_use(1):
        assert model[1].weight is own["1.weight"]
        assert model[2].weight is not own["2.weight"]
        assert not model[2].weight.requires_grad
    assert all(parameter is own[name] for name, parameter in model.named_parameters())
    with pytest.raises(KeyError, match="backward"), copies.in_use(0):
        raise KeyError("backward")
    assert all(parameter is own[name] for name, parameter in model.named_parameters())


def test_a_second_run_begins_with_the_weights_as_they_are_then():
    model = three_blocks()
    copies = Copies(model, LENT, every=2, lag=1)
    for step in range(4):
        copies.advance_(step)
        move(model, step)
    copies.advance_(0)
    assert equal(borrowed(copies, model), live(model))
    assert not copies._waiting


def test_frozen_weights_are_not_copied():
    model = three_blocks()
    model[2].weight.requires_grad_(False)
    copies = Copies(model, LENT, every=0)
    with copies.in_use(1):
        assert model[2].weight is dict(model.named_parameters())["2.weight"]


# ---- In a model ----


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "t5", "bart"])
def test_fresh_copies_of_all_layers_give_the_gradient_of_backpropagation(name):
    assert_gradients_of_backpropagation(SPECIMENS[name], BlockLocalConfig(head_layers=4, head_refresh_steps=5))


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "bart"])
def test_a_head_sees_nothing_of_what_later_blocks_have_become(name, borrow):
    model, batch = borrow(name).eval(), SPECIMENS[name].batch(0)
    seen = []
    config = BlockLocalConfig(num_blocks=4, head_layers=1, head_refresh_steps=0)
    assembly = assemble(model, config, batch)
    lower = set(assembly.parameters[0])
    for _ in range(2):
        with torch.no_grad():
            step = assembly.step

            def look(block, hidden, _logits, step=step):
                if block == 0:
                    with step.borrowing(0):
                        seen.append(step.seen_by_head(0, hidden, batch, None))

            with step.boundaries.attached(look):
                model(**batch)
            for parameter in model.parameters():
                if parameter not in lower and not is_tied_below(assembly, parameter):
                    parameter.mul_(1.5)
    assert torch.equal(*seen)


def is_tied_below(assembly, parameter):
    """A tied embedding is a later block's, and the first block's input changes with it."""
    return parameter is assembly.module.model.get_input_embeddings().weight


# ---- Through the Trainer ----


class Watch(TrainerCallback):
    """Notes after each step what the heads borrowed in it, and what the weights have become."""

    def __init__(self):
        self.used, self.after = [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.note(self.after)

    def on_step_end(self, args, state, control, **kwargs):
        with self.trainer.assembly.copies.in_use(0):
            self.note(self.used)
        self.note(self.after)

    def note(self, where):
        where.append(self.trainer.model.classifier.weight.detach().clone())


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("every", "lag"), [(0, 0), (3, 0), (2, 3), (1, 1)])
def test_a_run_borrows_what_is_due(every, lag, accumulation, tmp_path):
    refresh = {"head_copies": "frozen", "head_refresh_steps": every, "head_refresh_lag": lag}
    config = BlockLocalConfig(num_blocks=2, head_layers=1, **refresh)
    trainer = make("bert", tmp_path, config=config, max_steps=7, gradient_accumulation_steps=accumulation)
    watch = Watch()
    watch.trainer = trainer
    trainer.add_callback(watch)
    trainer.train()
    for step, used in enumerate(watch.used):
        taken_at = step - step % every - lag if every else 0
        assert torch.equal(used, watch.after[max(0, taken_at)]), step
    assert not torch.equal(watch.after[0], watch.after[-1])


def trained(folder, **values):
    settings = values.pop("settings", {})
    config = BlockLocalConfig(num_blocks=4, **({"head_layers": 1} | values))
    trainer = make(
        "bert", folder, config=config, **({"max_steps": 5, "optim": "sgd", "learning_rate": 0.1} | settings)
    )
    trainer.train()
    return snapshot(trainer)


def test_a_copy_at_every_step_is_the_live_layers(tmp_path):
    # An average that keeps next to nothing of the old copy takes the way over copies.
    live_layers = trained(tmp_path)
    always = {"head_refresh_steps": 1, "head_refresh_lag": 0}
    copied = trained(tmp_path, head_copies="frozen", head_refresh_decay=1e-12, **always)
    for key, value in live_layers.items():
        torch.testing.assert_close(copied[key], value, rtol=1e-5, atol=1e-7)
    frozen = trained(tmp_path, head_copies="frozen", head_refresh_steps=0)
    assert not torch.allclose(
        frozen["model.bert.encoder.layer.0.output.dense.weight"],
        live_layers["model.bert.encoder.layer.0.output.dense.weight"],
        atol=1e-5,
    )


def test_stepping_at_once_changes_no_bit(tmp_path):
    values = {"head_refresh_steps": 2, "head_refresh_lag": 1, "head_refresh_decay": 0.5}
    assert equal(trained(tmp_path, **values), trained(tmp_path, step_per_block=True, **values))


@pytest.mark.parametrize("setting", [{"gradient_checkpointing": True}, {"torch_compile": True}])
def test_copies_stay_in_place_until_the_backward_pass_is_over(setting, tmp_path):
    if "torch_compile" in setting:
        setting = setting | {"torch_compile_backend": "aot_eager"}
    plain, other = (trained(tmp_path, head_refresh_steps=0, settings=extra) for extra in ({}, setting))
    for key, value in plain.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["frozen", "trained"])
@pytest.mark.parametrize(("every", "lag", "decay"), [(0, 0, 0.0), (2, 3, 0.5), (3, 1, 0.0)])
def test_a_resumed_run_borrows_the_same_to_the_bit(every, lag, decay, kind, tmp_path):
    refresh = {"head_refresh_steps": every, "head_refresh_lag": lag, "head_refresh_decay": decay}
    config = BlockLocalConfig(num_blocks=2, head_layers=1, head_copies=kind, **refresh)
    saving = {"config": config, "max_steps": 9, "save_steps": 4}
    whole, resumed = whole_and_resumed(tmp_path, killed_after=6, **saving)
    assert equal(snapshot(whole), snapshot(resumed))
    first, second = (tmp_path / folder / "checkpoint-9" / COPIES_NAME for folder in ("whole", "killed"))
    assert first.read_bytes() == second.read_bytes()


def test_live_layers_are_neither_copied_nor_saved(tmp_path):
    config = BlockLocalConfig(num_blocks=2, head_layers=1)
    trainer = make("bert", tmp_path, config=config, save_strategy="steps", save_steps=3)
    trainer.train()
    assert trainer.assembly.copies is None
    assert not (tmp_path / "checkpoint-3" / COPIES_NAME).exists()


@pytest.mark.parametrize(
    ("saved", "asked", "message"),
    [
        ({}, {"head_refresh_steps": 2}, f"holds no {COPIES_NAME}"),
        ({"head_refresh_steps": 3}, {"head_refresh_steps": 2}, "taken with head_refresh_steps=3"),
        (
            {"head_refresh_steps": 2, "boundaries": (2,)},
            {"head_refresh_steps": 2, "boundaries": (2,), "head_layers": 2},
            r"layer\.2\.\S+ has shape None in the file",
        ),
        (
            {"head_refresh_steps": 2, "head_copies": "frozen"},
            {"head_refresh_steps": 2, "head_copies": "trained"},
            r"Resume with the cut, the head_layers, the head_copies",
        ),
    ],
)
def test_a_checkpoint_with_other_copies_is_refused(saved, asked, message, tmp_path):
    start = BlockLocalConfig(**({"head_layers": 1} | saved))
    make("bert", tmp_path, config=start, save_strategy="steps", save_steps=3).train()
    other = make("bert", tmp_path, max_steps=6, config=BlockLocalConfig(**({"head_layers": 1} | asked)))
    before = snapshot(other)
    with pytest.raises(CopiesMismatchError, match=message):
        other.train(resume_from_checkpoint=True)
    assert equal(before, snapshot(other))


@pytest.mark.parametrize("setting", [{"head_refresh_steps": 10}, {"head_refresh_lag": 2}, {"head_refresh_decay": 0.5}])
def test_copies_of_nothing_are_refused(setting):
    specimen = SPECIMENS["bert"]
    with pytest.raises(UnsupportedSettingError, match=r"the heads of BertForSequenceClassification use nothing"):
        assemble(specimen.build(), BlockLocalConfig(head_layers=0, **setting), specimen.batch(0))


@pytest.mark.parametrize(
    ("dtype", "decay", "warned"), [("bfloat16", 0.9, 1), ("bfloat16", 0.5, 0), ("float32", 0.9, 0)]
)
def test_averages_that_are_rounded_away_are_warned_of(dtype, decay, warned, caplog):
    model, batch = SPECIMENS["bert"].build().to(getattr(torch, dtype)), SPECIMENS["bert"].batch(0)
    assemble(model, BlockLocalConfig(head_layers=1, head_refresh_steps=2, head_refresh_decay=decay), batch)
    told = [record.message for record in caplog.records if "rounded away" in record.message]
    assert len(told) == warned


@pytest.mark.parametrize(("decay", "followed"), [(0.5, 0.9), (0.9, 0.6)])
def test_copies_in_bfloat16_follow_as_far_as_the_warning_says(decay, followed):
    torch.manual_seed(0)
    model = torch.nn.Linear(100, 100).bfloat16()
    copies = Copies(model, [{"weight"}], every=1, decay=decay)
    copies.advance_(0)
    before, target = model.weight.detach().float(), (model.weight.detach().float() * 1.05).bfloat16()
    model.weight.data.copy_(target)
    for step in range(1, 400):
        copies.advance_(step)
    moved = (copies[model.weight].float() - before).abs().sum() / (target.float() - before).abs().sum()
    assert (moved > followed) == (decay == 0.5)


def test_heads_of_their_own_over_a_vocabulary_can_have_a_copy_of_the_target_embedding():
    specimen = SPECIMENS["llama"]
    model, batch = specimen.build(), specimen.batch(0)
    config = BlockLocalConfig(head_layers=0, head_refresh_steps=2, negatives=None)
    assembly = assemble(model, config, batch)
    head, before = model.lm_head.weight, model.lm_head.weight.detach().clone()
    assembly.begin_step(0)
    with torch.no_grad():
        head.add_(1.0)
    assembly.begin_step(1)
    assert torch.equal(assembly.read_targets(batch).candidates.embeddings_CE, before)
    assembly.begin_step(2)
    assert torch.equal(assembly.read_targets(batch).candidates.embeddings_CE, head)
