"""Weights are pulled to where they started, after each step and apart from it, also in a run that was resumed."""

from __future__ import annotations

import copy

import pytest
import torch
from test_optim import adafactor_relative, adamw, give_gradients, groups_of, three_blocks
from test_parity import equal
from training import make, snapshot, whole_and_resumed

from hf_blocklocal import BlockLocalConfig
from hf_blocklocal.errors import AnchorMismatchError, UnsupportedSettingError
from hf_blocklocal.optim.anchor import ANCHOR_NAME, Anchor
from hf_blocklocal.optim.stepping import step_block_


def anchored(model, strength):
    optimizer = adamw(groups_of(model))
    anchor = Anchor(dict(model[:2].named_parameters()), strength)
    anchor.attach(optimizer)
    return optimizer, anchor


def test_the_pull_is_a_share_of_the_distance_by_the_rate_of_the_group():
    model, plain = three_blocks(), three_blocks()
    start = copy.deepcopy(model.state_dict())
    optimizer, _ = anchored(model, 0.5)
    of_plain = adamw(groups_of(plain))
    for chosen in (optimizer, of_plain):
        chosen.param_groups[1]["lr"] = 0.2
    for each in (model, plain):
        give_gradients(each, 0)
    optimizer.step()
    of_plain.step()
    for name, weight in model.state_dict().items():
        stepped, rate = plain.state_dict()[name], 0.2 if "bias" in name else 0.1
        expected = stepped if name.startswith("2.") else stepped - rate * 0.5 * (stepped - start[name])
        torch.testing.assert_close(weight, expected)
        assert torch.equal(weight, stepped) == name.startswith("2.")


def test_stepping_block_by_block_pulls_each_block_once():
    together, apart = three_blocks(), three_blocks()
    of_all, of_each = anchored(together, 0.5)[0], anchored(apart, 0.5)[0]
    for seed in range(3):
        give_gradients(together, seed)
        give_gradients(apart, seed)
        of_all.step()
        step_block_(of_each, list(apart[0].parameters()))
        step_block_(of_each, list(apart[1].parameters()))
        of_each.step()
    assert all(torch.equal(a, b) for a, b in zip(together.parameters(), apart.parameters(), strict=True))


def test_a_parameter_that_is_not_stepped_is_not_pulled():
    model = three_blocks()
    optimizer, _ = anchored(model, 0.5)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    before = model[0].weight.clone()
    give_gradients(model[1], 0)
    optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_attaching_again_does_not_pull_twice():
    model, once = three_blocks(), three_blocks()
    optimizer, anchor = anchored(model, 0.5)
    anchor.attach(optimizer)
    of_once, _ = anchored(once, 0.5)
    for each in (model, once):
        give_gradients(each, 0)
    optimizer.step()
    of_once.step()
    assert equal(model.state_dict(), once.state_dict())


def test_an_optimizer_without_learning_rates_is_refused():
    model = three_blocks()
    with pytest.raises(UnsupportedSettingError, match=r"anchor=0\.5 pulls by the learning rate .* Adafactor has none"):
        Anchor(dict(model.named_parameters()), 0.5).attach(adafactor_relative(groups_of(model)))


# ---- Through the Trainer ----


def distance(trainer, before):
    return sum((p - before[f"model.{name}"]).norm().item() for name, p in trainer.assembly.lower_weights().items())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_strong_anchor_holds_the_lower_blocks_and_leaves_the_last_alone(accumulation, tmp_path):
    moved, states = [], []
    for anchor in (0.0, 300.0):
        config = BlockLocalConfig(num_blocks=4, anchor=anchor, head_layers=0)
        settings = {"max_steps": 1, "max_grad_norm": 0, "gradient_accumulation_steps": accumulation}
        trainer = make("bert", tmp_path, config=config, **settings)
        before = snapshot(trainer)
        trainer.train()
        moved.append(distance(trainer, before))
        states.append(snapshot(trainer))
    assert moved[1] == pytest.approx(0.7 * moved[0], rel=1e-3)
    names = {parameter: key for key, parameter in trainer.assembly.module.named_parameters()}
    last = [names[parameter] for parameter in trainer.assembly.parameters[-1]]
    assert all(torch.equal(states[0][key], states[1][key]) for key in (*last, "heads.0.readout.linear.weight"))


def test_stepping_at_once_changes_no_bit(tmp_path):
    states = []
    for step_per_block in (False, True):
        config = BlockLocalConfig(num_blocks=4, anchor=50.0, block_lr_decay=0.5, step_per_block=step_per_block)
        trainer = make("gpt2", tmp_path, config=config, max_steps=4)
        trainer.train()
        states.append(snapshot(trainer))
    assert equal(*states)


@pytest.mark.parametrize("step_per_block", [False, True])
def test_a_resumed_run_is_pulled_to_the_pretrained_weights(step_per_block, tmp_path):
    config = BlockLocalConfig(num_blocks=2, anchor=100.0, step_per_block=step_per_block)
    saving = {"config": config, "max_steps": 9, "save_steps": 4}
    whole, resumed = whole_and_resumed(tmp_path, killed_after=6, **saving)
    assert equal(snapshot(whole), snapshot(resumed))
    for name in ("optimizer.pt", ANCHOR_NAME):
        first, second = (tmp_path / folder / "checkpoint-9" / name for folder in ("whole", "killed"))
        assert first.read_bytes() == second.read_bytes(), name


def test_a_second_call_of_train_keeps_the_first_start(tmp_path):
    trainer = make("bert", tmp_path, config=BlockLocalConfig(num_blocks=2, anchor=1.0))
    trainer.train()
    first = trainer.anchor
    trainer.train()
    assert trainer.anchor is first


def test_without_anchor_nothing_is_kept_or_written(tmp_path):
    trainer = make("bert", tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    assert trainer.anchor is None
    assert not (tmp_path / "checkpoint-3" / ANCHOR_NAME).exists()


def test_a_checkpoint_that_does_not_know_the_start_is_refused(tmp_path):
    make("bert", tmp_path, save_strategy="steps", save_steps=3).train()
    other = make("bert", tmp_path, max_steps=6, config=BlockLocalConfig(num_blocks=2, anchor=1.0))
    before = snapshot(other)
    with pytest.raises(AnchorMismatchError, match=f"holds no {ANCHOR_NAME}"):
        other.train(resume_from_checkpoint=True)
    assert equal(before, snapshot(other))


def test_the_start_of_other_parameters_is_refused(tmp_path):
    model = three_blocks()
    Anchor(dict(model[:1].named_parameters()), 1.0).save(tmp_path)
    anchor = Anchor(dict(model[:2].named_parameters()), 1.0)
    with pytest.raises(AnchorMismatchError, match=r"1\.bias has shape None in the file and \(3,\) here"):
        anchor.load_(tmp_path)
