"""In the first steps heads learn and lower blocks stand still, in every way a run can be set up."""

from __future__ import annotations

import pytest
import torch
from test_parity import equal
from training import make, snapshot, whole_and_resumed
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble


WARM = BlockLocalConfig(num_blocks=4, head_warmup_steps=2)


def moved(trainer, before):
    return {key for key, value in snapshot(trainer).items() if not torch.equal(value, before[key])}


def of_lower_blocks(trainer):
    names = {parameter: key for key, parameter in trainer.assembly.module.named_parameters()}
    return {names[parameter] for block in trainer.assembly.parameters[:-1] for parameter in block}


@pytest.mark.parametrize("step_per_block", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral", "t5"])
def test_only_heads_and_the_last_block_learn_at_first(name, accumulation, step_per_block, tmp_path):
    config = BlockLocalConfig(num_blocks=4, head_warmup_steps=2, step_per_block=step_per_block, head_layers=0)
    settings = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 0.5, "weight_decay": 0.1}
    trainer = make(name, tmp_path, config=config, max_steps=2, **settings)
    before = snapshot(trainer)
    trainer.train()
    changed = moved(trainer, before)
    assert {key for key in changed & of_lower_blocks(trainer) if not key.startswith("heads")} == set()
    for block in range(3):
        assert any(key.startswith(f"heads.{block}.") for key in changed)
    assert changed - of_lower_blocks(trainer)
    assert all(trainer.state.log_history[0][f"block_{block}/loss"] > 0 for block in range(4))


def test_all_blocks_learn_afterwards(tmp_path):
    trainer = make("bert", tmp_path, config=WARM, max_steps=3, lr_scheduler_type="constant")
    before = snapshot(trainer)
    trainer.train()
    changed = moved(trainer, before)
    for layer in range(4):
        assert any(f"layer.{layer}." in key for key in changed)


def test_heads_and_the_last_block_do_not_notice(tmp_path):
    config = BlockLocalConfig(num_blocks=2, head_warmup_steps=1)
    states = []
    for warm in (BlockLocalConfig(num_blocks=2), config):
        trainer = make("bert", tmp_path, config=warm, max_steps=1, max_grad_norm=0)
        trainer.train()
        states.append(snapshot(trainer))
    names = {parameter: key for key, parameter in trainer.assembly.module.named_parameters()}
    last = {names[parameter] for parameter in trainer.assembly.parameters[-1]}
    heads = {key for key in states[0] if key.startswith("heads")}
    assert all(torch.equal(states[0][key], states[1][key]) for key in last | heads)


def test_with_heads_that_only_borrow_the_lower_blocks_stand_still(tmp_path):
    """Also where the borrowed language-model head is tied to the embedding of the first block."""
    config = BlockLocalConfig(num_blocks=2, head_layers=2, head_warmup_steps=2)
    model, batch = SPECIMENS["gpt2"].build(), SPECIMENS["gpt2"].batch(0)
    assembly = assemble(model, config, batch)
    lesson = assembly.step.teach(
        assembly.read_targets(batch),
        scale=1.0,
        inputs=batch,
        backward=torch.Tensor.backward,
        learned=lambda *_: None,
        heads_only=True,
    )
    with lesson as report:
        model(**batch)
    assert [loss.item() > 0 for loss in report.losses] == [True]
    assert all(parameter.grad is None for parameter in model.parameters())
    trainer = make("gpt2", tmp_path, config=config, max_steps=2)
    before = snapshot(trainer)
    trainer.train()
    assert not moved(trainer, before) & of_lower_blocks(trainer)


def test_a_loss_scaler_goes_with_it(tmp_path):
    trainer = make("bert", tmp_path, config=WARM, max_steps=4)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    before = snapshot(trainer)
    trainer.train()
    assert any("layer.0." in key for key in moved(trainer, before))


def test_a_run_killed_in_the_warm_up_resumes_to_the_bit(tmp_path):
    config = BlockLocalConfig(num_blocks=2, head_warmup_steps=5)
    saving = {"config": config, "max_steps": 8, "save_steps": 3}
    whole, resumed = whole_and_resumed(tmp_path, killed_after=4, **saving)
    assert equal(snapshot(whole), snapshot(resumed))
    frozen = make("bert", tmp_path / "frozen", config=BlockLocalConfig(num_blocks=2, head_warmup_steps=8), max_steps=8)
    frozen.train()
    assert not equal(snapshot(whole), snapshot(frozen))
