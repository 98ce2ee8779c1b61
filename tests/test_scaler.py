"""Loss scaling block by block: what overflows in one block leaves the others alone, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from overflowing import overflows, scaled
from several_devices import Machine, device
from test_parity import equal, examples
from test_spreading import Watch, apart, assert_logged_alike, state_of, trainer_of
from torch import nn
from training import Stop, make, snapshot
from transformers import Trainer, TrainerCallback
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig
from hf_blocklocal.devices import layout
from hf_blocklocal.errors import UnsupportedSettingError
from hf_blocklocal.optim.scaler import BlockScaler, check_leaves_out, state_of_all


# The first layer of each of four blocks, where a gradient that is spoilt reaches the weights of that block alone.
QUERY = [f"bert.encoder.layer.{layer}.attention.self.query" for layer in range(4)]
# Heads that borrow a layer would overflow with it.
OWN = {"head_layers": 0}


class Blocks:
    """Two blocks of one weight each, and a scaler that is told by hand which of them is at work."""

    def __init__(self, *, coupled=False, **options):
        self.weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
        self.optimizer = torch.optim.AdamW(self.weights, lr=0.1, fused=True)
        self.at_work = 0
        given = torch.amp.GradScaler("cpu", init_scale=8.0)
        self.scaler = BlockScaler(given, at_work=lambda: self.at_work, **options)
        self.begin(coupled=coupled)

    def begin(self, **options):
        self.scaler.begin_({block: [weight] for block, weight in enumerate(self.weights)}, **options)

    def send_back(self, block, factor=1.0):
        self.at_work = block
        self.scaler.scale((self.weights[block] * factor).sum()).backward()

    def step(self):
        self.scaler.step(self.optimizer, None)
        self.scaler.update()
        self.optimizer.zero_grad()

    @property
    def scales(self):
        return [self.scaler.state_dict()["blocks"][block]["scale"] for block in ("0", "1")]


def test_a_block_that_overflows_is_left_out_and_its_scale_is_lowered():
    blocks = Blocks()
    blocks.send_back(0, torch.inf)
    blocks.send_back(1)
    assert torch.equal(blocks.weights[1].grad, torch.full((2,), 8.0))
    blocks.scaler.unscale_(blocks.optimizer)
    assert blocks.weights[0].grad is None
    assert torch.equal(blocks.weights[1].grad, torch.ones(2))
    blocks.step()
    assert torch.equal(blocks.weights[0], torch.ones(2))
    assert not torch.equal(blocks.weights[1], torch.ones(2))
    assert blocks.scales == [4.0, 8.0]
    assert blocks.scaler.get_scale() == 4.0
    assert {block: count.item() for block, count in blocks.scaler.overflows.items()} == {0: 1, 1: 0}


def test_coupled_blocks_scale_alike_and_still_leave_out_their_own_steps():
    blocks = Blocks(coupled=True)
    blocks.send_back(0, torch.inf)
    blocks.send_back(1)
    blocks.step()
    assert torch.equal(blocks.weights[0], torch.ones(2))
    assert not torch.equal(blocks.weights[1], torch.ones(2))
    assert blocks.scales == [4.0, 4.0]


def test_blocks_settled_one_by_one_are_unscaled_once():
    one_by_one, at_once = Blocks(), Blocks()
    for blocks in (one_by_one, at_once):
        for block in (0, 1):
            blocks.send_back(block)
            if blocks is one_by_one:
                blocks.scaler.settle_(block)
        blocks.step()
    assert all(torch.equal(*weights) for weights in zip(one_by_one.weights, at_once.weights, strict=True))


@pytest.mark.parametrize("lost", [0, 1, None])
def test_an_optimizer_that_leaves_out_by_itself_comes_to_the_same(lost):
    waiting, not_waiting = Blocks(), Blocks(waits=False)
    for blocks in (waiting, not_waiting):
        for step in range(3):
            for block in (0, 1):
                blocks.send_back(block, torch.inf if block == lost and step == 1 else 1.0)
            blocks.step()
    assert all(torch.equal(*weights) for weights in zip(waiting.weights, not_waiting.weights, strict=True))
    assert waiting.scaler.state_dict() == not_waiting.scaler.state_dict()
    assert not hasattr(not_waiting.optimizer, "found_inf")


def test_what_overflows_in_another_part_of_a_block_leaves_it_out_here():
    blocks = Blocks(add_up=lambda found: found + 1)
    blocks.send_back(0)
    blocks.step()
    assert torch.equal(blocks.weights[0], torch.ones(2))
    assert blocks.scales == [4.0, 8.0]


def test_a_block_without_gradient_or_without_a_loss_of_its_own_is_no_matter():
    blocks = Blocks()
    blocks.step()
    assert blocks.scales == [8.0, 8.0]
    blocks.weights[1].grad = torch.full((2,), 8.0)  # as another process has averaged it in
    blocks.scaler.unscale_()
    assert torch.equal(blocks.weights[1].grad, torch.ones(2))


def test_the_state_of_blocks_is_one_of_all_and_the_other_way_round():
    blocks = Blocks()
    blocks.send_back(0, torch.inf)
    blocks.send_back(1)
    blocks.step()
    state = blocks.scaler.state_dict()
    assert [state["scale"], state["_growth_tracker"]] == [4.0, 0]
    parts = [{block: state["blocks"][block]} for block in ("0", "1")]
    assert state_of_all(parts) == state
    plain = torch.amp.GradScaler("cpu")
    plain.load_state_dict(state)
    assert plain.get_scale() == 4.0
    others = Blocks()
    others.scaler.load_state_dict(state)
    assert others.scales == [4.0, 8.0]
    others.scaler.load_state_dict(plain.state_dict())
    assert others.scales == [4.0, 4.0]
    coupled = Blocks(coupled=True)
    coupled.scaler.load_state_dict(state)
    assert coupled.scales == [4.0, 4.0]


def test_where_nobody_waits_the_optimizer_must_leave_out_by_itself():
    weights = [nn.Parameter(torch.ones(1))]
    check_leaves_out(torch.optim.AdamW(weights, fused=True))
    with pytest.raises(UnsupportedSettingError, match=r"fp16 and blocks on several devices, AdamW would have to wait"):
        check_leaves_out(torch.optim.AdamW(weights))


# ---- Through the trainer ----


def make_four(folder, name="bert", *, config=None, **settings):
    config = BlockLocalConfig(num_blocks=4, **(config or {}))
    return make(name, folder, config=config, **{"max_steps": 3, "max_grad_norm": 0.5} | settings)


def trained(trainer):
    trainer.train()
    return trainer


class FarApart(TrainerCallback):
    """Lets the blocks of a run begin with scales that are far apart, where each has its own."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        scaler = self.trainer.accelerator.scaler
        state = scaler.state_dict()
        blocks = {block: each | {"scale": 2.0 ** (8 + 4 * int(block))} for block, each in state["blocks"].items()}
        scaler.load_state_dict(state | {"blocks": blocks})


@pytest.mark.parametrize(
    ("name", "options", "settings"),
    [
        ("bert", {}, {"gradient_accumulation_steps": 2}),
        ("bert", {"step_per_block": True, "head_layers": 0, "denoising": 0.5}, {}),
        ("bert", {"overlap": 2, "step_per_block": True}, {}),
        ("gpt2", {"step_per_block": True}, {}),  # an embedding that the first and the last block teach
        ("bert", {"global_every": 2}, {}),
        ("bert", {"head_layers": 0, "feedback": "chained"}, {"max_grad_norm": 0}),
        ("bert", {"head_warmup_steps": 1}, {"optim": "adafactor"}),
        ("bert", {"reconstruction": 0.5, "denoising": 0.5}, {}),
        ("gpt2", {"tied_weights": "untie", "head_bypass": "straight_through"}, {}),
        ("gpt2", {"tied_weights": "freeze", "head_layers": 0, "negatives": 3}, {}),
    ],
)
def test_scaled_losses_teach_the_same_to_the_bit(name, options, settings, tmp_path):
    """Scales are powers of two: in float32 nothing is rounded, as long as nothing overflows.

    A gradient that reaches a block from the loss of another one would be divided by another scale than it was
    multiplied with.
    """
    plain = trained(make_four(tmp_path, name, config=options, **settings))
    ours = scaled(make_four(tmp_path, name, config=options, **settings), growth_interval=1)
    ours.add_callback(FarApart(ours))
    trained(ours)
    assert equal(snapshot(plain), snapshot(ours))
    assert plain.state.log_history[:-1] == ours.state.log_history[:-1]
    scales = [state["scale"] for state in ours.accelerator.scaler.state_dict()["blocks"].values()]
    assert len(set(scales)) == (1 if ours.assembly.couples else 4)
    assert min(scales) > 2**8


def test_a_single_block_keeps_the_scaler_of_the_trainer(tmp_path):
    ours = trained(scaled(make("bert", tmp_path, blocks=1)))
    assert isinstance(ours.accelerator.scaler, torch.amp.GradScaler)
    plain = Trainer(SPECIMENS["bert"].build(), ours.args, train_dataset=examples(SPECIMENS["bert"]))
    assert equal(trained(scaled(plain)).model.state_dict(), ours.model.state_dict())


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("lost", [0, 2, 3])
def test_what_overflows_in_one_block_leaves_it_alone_and_steps_the_others(lost, at_once, tmp_path):
    def run(steps, *lost_in):
        settings = {"config": OWN | {"step_per_block": at_once}, "max_steps": steps, "lr_scheduler_type": "constant"}
        return trained(overflows(scaled(make_four(tmp_path, **settings)), lost_in, QUERY[lost]))

    two, clean, three = run(2), run(3), run(3, 3)
    names = {parameter: name for name, parameter in three.assembly.module.named_parameters()}
    for block, parameters in enumerate(three.assembly.parameters):
        for name in (names[parameter] for parameter in parameters):
            expected = two if block == lost else clean
            assert torch.equal(snapshot(three)[name], snapshot(expected)[name]), name
    blocks = three.accelerator.scaler.state_dict()["blocks"]
    assert [blocks[str(block)]["scale"] == 2**16 for block in range(4)] == [block != lost for block in range(4)]
    assert three.state.log_history[-2][f"block_{lost}/overflows"] == 1
    assert not any(f"block_{block}/overflows" in row for row in three.state.log_history[:-2] for block in range(4))


@pytest.mark.parametrize("options", [{}, {"anchor": 0.5}, {"overlap": 1}])
def test_wherever_and_whenever_blocks_are_stepped_overflows_come_to_the_same(options, tmp_path):
    runs = []
    for at_once in (False, True):
        settings = {"config": OWN | options | {"step_per_block": at_once}, "gradient_accumulation_steps": 2}
        trainer = scaled(make_four(tmp_path, max_steps=5, **settings), growth_interval=2)
        runs.append(trained(overflows(overflows(trainer, [2, 3], QUERY[1]), [3], QUERY[3])))
    assert equal(*map(snapshot, runs))
    assert runs[0].accelerator.scaler.state_dict() == runs[1].accelerator.scaler.state_dict()
    assert runs[0].state.log_history[-2]["block_1/overflows"] == 2
    rates = [row["learning_rate"] for row in runs[0].state.log_history[:-1]]
    assert len(set(rates)) == len(rates)  # the schedule goes on


def test_a_killed_run_goes_on_with_the_scale_of_every_block(tmp_path):
    def run(folder, *callbacks):
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "callbacks": list(callbacks)}
        trainer = make_four(tmp_path / folder, config=OWN, **settings)
        return overflows(scaled(trainer, growth_interval=2), [1, 2, 5], QUERY[2])

    whole, killed = run("whole"), run("killed", Stop(4))
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = run("killed")
    resumed.train(resume_from_checkpoint=True)
    assert equal(snapshot(whole), snapshot(resumed))
    assert whole.accelerator.scaler.state_dict() == resumed.accelerator.scaler.state_dict()
    assert len({state["scale"] for state in whole.accelerator.scaler.state_dict()["blocks"].values()}) == 2


def test_a_run_goes_on_without_scales_from_one_that_had_them(tmp_path):
    settings = {"config": OWN, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trained(scaled(make_four(tmp_path, **settings)))
    resumed = make_four(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(snapshot(whole), snapshot(resumed))


@pytest.mark.parametrize("options", [{}, {"overlap": 1}])
def test_a_run_after_one_that_was_interrupted_begins_with_its_scales_and_nothing_else(options, tmp_path):
    def interrupt(module, args):
        if module.training and trainer.state.global_step == 1:
            raise KeyboardInterrupt

    runs = []
    for how in (lambda trainer: trainer, lambda trainer: scaled(trainer, growth_interval=1)):
        trainer = how(make_four(tmp_path, config={"step_per_block": True, **options}))
        handle = trainer.model.classifier.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        handle.remove()
        runs.append(trained(trained(trainer)))
    assert equal(*map(snapshot, runs))
    assert runs[1].accelerator.scaler.get_scale() == 2 ** (16 + 1 + 3 + 3)


CASES = {"joint": {}, "at once": {"step_per_block": True, "anchor": 1.0}}


@pytest.mark.parametrize("case", CASES)
def test_on_several_devices_nobody_waits_and_overflows_come_to_the_same(case, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "accelerators", lambda: [device(0), device(1), device(2)])
    machine, options = Machine(), CASES[case] | OWN | {"num_blocks": 3}
    watch = Watch(machine)

    def run(config, **settings):
        trainer = scaled(trainer_of("bert", tmp_path, config, logging_steps=4, **settings), growth_interval=2)
        return trained(overflows(trainer, [2, 4], QUERY[1]))

    one = run(BlockLocalConfig(**options))
    with machine.running():
        several = run(BlockLocalConfig(placement="devices", **options), callbacks=[watch])
        state = several.accelerator.scaler.state_dict()
    assert equal(state_of(several), state_of(one))
    assert set(watch.waits) == {1, 2, 3, 4}
    assert not any(watch.waits.values())
    assert state == one.accelerator.scaler.state_dict()
    assert_logged_alike(several, one)
    row = several.state.log_history[0]
    assert {key: count for key, count in row.items() if "overflows" in key} == {"block_1/overflows": 2}


def test_on_several_devices_other_optimizers_are_refused_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "accelerators", lambda: [device(0), device(1), device(2)])
    with Machine().running():
        trainer = scaled(trainer_of("bert", tmp_path, apart(), optim="adamw_torch"))
        with pytest.raises(UnsupportedSettingError, match="AdamW would have to wait at every step"):
            trainer.train()
