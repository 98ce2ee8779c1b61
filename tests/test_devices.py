"""Blocks on several devices learn to the bit what they learn on one, and no step waits for a later device.

The devices are made of main memory (`several_devices`), which has their rules and writes down every copy and wait.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import pytest
import torch
from menagerie import MENAGERIE
from several_devices import CPU, Machine, device
from stepping import stepped
from zoo import SPECIMENS as ZOO

from hf_blocklocal import BlockLocalConfig, assemble, truncate
from hf_blocklocal.config.defaults import settled
from hf_blocklocal.crossing import sent, set_out, turn_to
from hf_blocklocal.devices import hosting
from hf_blocklocal.devices.copying import CopiesOnDevices, Pool
from hf_blocklocal.devices.hosting import LABELS
from hf_blocklocal.devices.spreading import Spread, gather_
from hf_blocklocal.errors import UnsupportedSettingError


SPECIMENS = ZOO | {"resnet": MENAGERIE["resnet"]}
STEPS = 5
REFRESHED = {"head_refresh_steps": 2, "head_refresh_lag": 1}
ALONE = {"head_copies": "trained", "head_refresh_steps": 0}
UNTIED = {"tied_weights": "untie"}
FROZEN = {"tied_weights": "freeze", "head_layers": 0}
FOUR = {"num_blocks": 4, "head_layers": 2, "head_bypass": "skip"}
CASES = {
    "bert, own heads": ("bert", {"head_layers": 0}),
    "bert": ("bert", REFRESHED),
    "bert, prototypes": ("bert", {"feedback": "prototype", "reconstruction": 0.5}),
    "bert, frozen copies": ("bert", REFRESHED | {"head_copies": "frozen"}),
    "bert_mlm": ("bert_mlm", REFRESHED | UNTIED | {"head_refresh_decay": 0.5}),
    "gpt2, own heads": ("gpt2", REFRESHED | UNTIED | {"head_layers": 0, "negatives": 8}),
    "llama, all layers": ("llama", REFRESHED | {"head_layers": 4, "head_lens": True, "chunked_loss": 8}),
    "gemma3, two kinds of mask": ("gemma3", REFRESHED | UNTIED),
    "deberta_v2, shared positions": ("deberta_v2", REFRESHED),
    "vit": ("vit", {"head_refresh_steps": 3, "bootstrap": 0.0}),
    "t5": ("t5", FROZEN | {"head_layers": 2, "head_bypass": "skip"} | ALONE),
    "t5, own heads": ("t5", REFRESHED | FROZEN),
    "bart, whole decoder": ("bart", FROZEN | {"head_layers": 4, "head_bypass": "skip"} | ALONE),
    "bart": ("bart", REFRESHED | FROZEN),
    # Of four blocks, two end in the decoder, on other devices than the states of the encoder.
    "t5, four blocks": ("t5", FROZEN | FOUR | REFRESHED),
    "bart, four blocks": ("bart", FROZEN | FOUR | ALONE),
    "whisper, four blocks": ("whisper", FROZEN | FOUR | REFRESHED),
    "bart, four blocks, own heads": ("bart", REFRESHED | FROZEN | {"num_blocks": 4}),
    "whisper": ("whisper", REFRESHED | FROZEN),
    "resnet, running statistics": ("resnet", REFRESHED | {"num_blocks": 2, "head_layers": 1}),
    "wav2vec2, masks in the task head": ("wav2vec2", {"head_layers": 0}),
}
# What only the machine of main memory waits for: the device of tensors made in scripted functions.
SCRIPTED = {"deberta_v2, shared positions"}


def build(name):
    model = SPECIMENS[name].build()
    model.config.use_cache = False  # as the Trainer has it
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return model


class Run:
    """Some steps of a specimen in blocks, three if nothing else is said, on one device or on one each.

    Attributes:
        state: Weights and heads at the end.
        losses: The losses of all blocks, step by step.
        copies: Copies between devices within steps, those from main memory aside.
        refreshes: The same between steps, when weights are copied for the heads.
        waits: What made the host wait.
        gradients_crossed: Gradients that went from one device to another.
    """

    def __init__(self, name, options, *, apart):
        machine = Machine()
        self.copies, self.refreshes, self.waits, self.losses = [], [], [], []
        with machine.running() if apart else nullcontext():
            self._teach(name, options, machine, apart=apart)
        self.gradients_crossed = machine.gradients_crossed

    def _teach(self, name, options, machine, *, apart):
        model, specimen = build(name), SPECIMENS[name]
        options = {"num_blocks": 3, "placement": "devices" if apart else "auto"} | options
        config = BlockLocalConfig(**options)
        assembly, spread = assemble(model, config, specimen.batch(0)), None
        if apart:
            spread = Spread(assembly, [device(block) for block in range(config.num_blocks)], specimen.batch(0))
            assembly = spread.assembly
        optimizer = torch.optim.SGD(assembly.module.parameters(), lr=0.1)
        model.train()
        for step in range(STEPS):
            machine.forget()
            assembly.begin_step(step)
            self.refreshes.append(between_devices(machine.copies))
            machine.copies.clear()
            batch = specimen.batch(step + 1)
            targets = assembly.read_targets(batch, seed=(step,))
            losses = stepped(assembly, optimizer, batch, targets, step=step)
            self.copies += between_devices(machine.copies)
            self.waits += machine.waits if step > 0 else []
            self.losses += losses
        self.losses = [loss.item() for loss in self.losses]
        module = assembly.module
        self.state = {key: value.clone() for key, value in [*module.state_dict().items(), *module.named_parameters()]}


def between_devices(copies):
    return [copy for copy in copies if copy.source != CPU]


@cache
def run(case, *, apart):
    name, options = CASES[case]
    return Run(name, options, apart=apart)


def test_kernels_that_ask_for_the_current_device_run_where_the_block_is(monkeypatch):
    turned, came_from = [], 7
    monkeypatch.setattr(hosting, "turn_to", lambda to: turned.append(to.index) or device(came_from))
    Run("bert", {"head_layers": 0}, apart=True)
    assert turned.pop() == came_from
    order = turned[-turned[::-1].index(came_from) :]  # of the last forward pass
    assert order == sorted(order)
    assert set(order) == {0, 1, 2}


@pytest.mark.parametrize(("kind", "asked"), [("cuda", [1]), ("cpu", [])])
def test_only_a_gpu_can_be_turned_to(kind, asked, monkeypatch):
    set_to = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda to: set_to.append(to.index))
    before = turn_to(torch.device(kind, 1))
    assert set_to == asked
    assert before == (torch.device("cuda", 0) if asked else None)


@pytest.mark.parametrize("case", CASES)
def test_blocks_learn_on_several_devices_what_they_learn_on_one(case):
    apart, together = run(case, apart=True), run(case, apart=False)
    assert apart.losses == together.losses
    assert apart.state.keys() == together.state.keys()
    for key, value in together.state.items():
        assert torch.equal(apart.state[key], value), key


@pytest.mark.parametrize("case", CASES)
def test_within_a_step_tensors_go_from_a_device_to_the_next_and_no_gradient_goes_anywhere(case):
    apart = run(case, apart=True)
    ways = {(copy.source.index, copy.target.index) for copy in apart.copies}
    assert ways == {(block, block + 1) for block in range(CASES[case][1].get("num_blocks", 3) - 1)}
    assert apart.gradients_crossed == 0


@pytest.mark.parametrize("case", [case for case in CASES if case not in SCRIPTED])
def test_no_step_makes_the_host_wait_for_a_device(case):
    assert run(case, apart=True).waits == []


def test_copies_come_down_only_when_they_are_due():
    refreshes = run("bert", apart=True).refreshes
    downward = [{copy.source.index > copy.target.index for copy in copies} for copies in refreshes]
    assert downward == [{True}, {True}, set(), {True}, set()]  # taken at 0; set out at 1 and 3, one step ahead of 2, 4


def test_heads_on_several_devices_use_late_copies_by_default():
    config = settled(BlockLocalConfig(num_blocks=3, placement="devices"), single_stack=True)
    assert (config.head_layers, config.head_refresh_steps, config.head_refresh_lag) == (2, 10, 1)


# ---- Pieces ----


def test_a_model_with_a_frozen_weight_at_both_ends_runs_and_comes_together_again():
    plain = build("t5").eval()
    batch = SPECIMENS["t5"].batch(1)
    with torch.no_grad():
        expected = plain(**batch).logits
    with Machine().running(), torch.no_grad():
        model = build("t5").eval()
        assembly = assemble(model, BlockLocalConfig(num_blocks=2, placement="devices"), SPECIMENS["t5"].batch(0))
        Spread(assembly, [device(0), device(1)], SPECIMENS["t5"].batch(0))
        assert model.lm_head.weight.device == model.shared.weight.device == device(0)
        assert model(**batch).logits.device == device(1)
        assert torch.equal(model(**batch).logits.to("cpu"), expected)
        gather_(model)
        assert {parameter.device for parameter in model.parameters()} == {CPU}
        assert torch.equal(model(**batch).logits, expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_spread_model_generates_what_it_did():
    prompt = SPECIMENS["llama"].batch(0)["input_ids"][:, :5]
    plain = build("llama").eval()
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": True, "attention_mask": torch.ones_like(prompt)}
    expected = plain.generate(prompt, **options)
    with Machine().running():
        model = build("llama").eval()
        batch = SPECIMENS["llama"].batch(0)
        assembly = assemble(model, BlockLocalConfig(num_blocks=2, placement="devices"), batch)
        Spread(assembly, [device(0), device(1)], batch)
        here = {name: value.to(device(0)) if name == "attention_mask" else value for name, value in options.items()}
        written = model.generate(prompt.to(device(0)), **here)
        with pytest.raises(UnsupportedSettingError, match="lie on several devices.*Save the model"):
            truncate(assembly, 1)
    assert torch.equal(written, expected)


def test_frozen_copies_follow_what_is_loaded():
    with Machine().running(), torch.no_grad():
        model = build("t5").eval()
        batch = SPECIMENS["t5"].batch(0)
        assembly = assemble(model, BlockLocalConfig(num_blocks=2, placement="devices"), batch)
        spread = Spread(assembly, [device(0), device(1)], batch)
        before = model(**batch).logits.clone()
        model.shared.weight.mul_(2)
        spread.renew_()
        assert not torch.equal(model(**batch).logits, before)
        other = build("t5").eval()
        other.shared.weight.mul_(2)
        assert torch.equal(model(**batch).logits.to("cpu"), other(**batch).logits)


def test_inputs_go_straight_to_where_they_are_needed():
    with Machine().running():
        model, batch = build("bert"), SPECIMENS["bert"].batch(0)
        assembly = assemble(model, BlockLocalConfig(num_blocks=2, placement="devices"), batch)
        placed = Spread(assembly, [device(0), device(1)], batch).placed({**batch, "name": "a string"})
        assert {name: value.device.index for name, value in placed.items() if name != "name"} == {
            "input_ids": 0,
            "attention_mask": 0,
            "labels": 1,
        }
        assert "labels" in LABELS
        assert placed["name"] == "a string"


def test_a_weight_that_learns_where_it_does_not_run_is_refused():
    with Machine().running():
        model, batch = build("gpt2"), SPECIMENS["gpt2"].batch(0)
        assembly = assemble(model, BlockLocalConfig(num_blocks=2, tied_weights="add"), batch)
        with pytest.raises(
            UnsupportedSettingError, match="wte.weight runs with block 0, on hpu:0, and learns from block 1"
        ):
            Spread(assembly, [device(0), device(1)], batch)


def test_a_model_that_brings_blocks_together_is_refused(monkeypatch):
    with Machine().running():
        model, batch = build("bert"), SPECIMENS["bert"].batch(0)
        assembly = assemble(model, BlockLocalConfig(num_blocks=2, placement="devices"), batch)
        trunk = type(model.bert.encoder).forward

        def with_a_skip(encoder, hidden_states, *args, **kwargs):
            output = trunk(encoder, hidden_states, *args, **kwargs)
            output.last_hidden_state = output.last_hidden_state + hidden_states
            return output

        monkeypatch.setattr(type(model.bert.encoder), "forward", with_a_skip)
        with pytest.raises(UnsupportedSettingError, match="brings tensors of different blocks together"):
            Spread(assembly, [device(0), device(1)], batch)
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_two_blocks_on_one_device_share_its_copies():
    with Machine().running():
        model = torch.nn.Linear(2, 2)
        pool = Pool(model)
        assert pool.copy("weight", device(0)) is pool.copy("weight", device(0))
        assert pool.copy("weight", device(0)) is not pool.copy("weight", device(1))
        assert pool.copy("weight", device(1)).device == device(1)


def test_copies_on_several_devices_are_saved_once_and_loaded_everywhere(tmp_path):
    from hf_blocklocal.borrowing.copies import Copies

    def made():
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 2)
        like, pool = Copies(model, [{"weight"}], every=2, lag=1), Pool(model)
        places = {(device(index), "weight") for index in (0, 1)}
        return model, like, CopiesOnDevices(pool, places, like, [device(0), device(1)]), pool

    with Machine().running(), torch.no_grad():
        model, like, copies, _ = made()
        for step in range(4):
            like.advance_(step)
            copies.advance_(step)
            model.weight.add_(1)
        assert copies.state().keys() == like.state().keys()
        assert all(torch.equal(copies.state()[key].to("cpu"), value) for key, value in like.state().items())
        like.save(tmp_path)  # as a run on one device would have written it
        _, _, resumed, pool = made()
        resumed.load_(tmp_path)
        resumed.advance_(4)
        copies.advance_(4)
        for (where, _), copy in pool.copies.items():
            assert copy.device == where
            assert torch.equal(copy.to("cpu"), copies.state()["copy/weight"].to("cpu"))


def test_what_is_sent_arrives_and_what_has_set_out_stays_as_it_was():
    with Machine().running() as machine:
        tensor = torch.arange(3.0)
        assert sent(tensor, CPU) is tensor
        there = sent(tensor, device(1))
        assert there.device == device(1)
        assert machine.waits == []
        underway = set_out(there, device(0))
        there.zero_()
        assert underway.arrived().device == device(0)
        assert underway.arrived().tolist() == [0, 1, 2]


# ---- The machine itself ----


def test_the_machine_keeps_the_rules_of_devices():
    with Machine().running() as machine:
        here, there = torch.ones(2, device=device(0)), torch.ones(2, device=device(1))
        assert (here + here).device == device(0)
        assert (there * torch.tensor(2.0)).device == device(1)
        for mixed in (lambda: here + there, lambda: here + torch.ones(2), lambda: here * there.sum()):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        assert machine.waits == []
        (here > 0).nonzero()
        float(there.sum())
        there.tolist()
        here.cpu()
        assert [(wait[0].index, wait[1]) for wait in machine.waits] == [
            (0, "nonzero"),
            (1, "_local_scalar_dense"),
            (1, "tolist"),
            (0, "copy"),
        ]


def test_the_machine_counts_gradients_that_cross():
    with Machine().running() as machine:
        weight = torch.ones(2, device=device(0), requires_grad=True)
        weight.to(device(1)).sum().backward()
        assert machine.gradients_crossed == 1
        assert weight.grad.device == device(0)
