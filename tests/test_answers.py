"""A model that runs again on a batch is told what it has asked before, and nobody waits for a device twice."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from several_devices import Machine, device
from stepping import stepped
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.anatomy.answers import Answers, compiles_outside, is_waited_for
from hf_blocklocal.crossing import sent


MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
ASKING = ["bert", "roberta", "distilbert", "gpt2", "llama", "opt", "t5", "bart", "whisper"]


@pytest.fixture
def machine():
    with Machine().running() as machine:
        yield machine


def answers_on(batch):
    return Answers(batch, [nn.Identity()], [0])


def ask(mask):
    """Ask what models ask, some of it of what they have made themselves."""
    fresh = mask.new_zeros(2, 4)
    fresh[:, 1:] = mask[:, :-1]
    alias = fresh[:, :2]
    before = int(alias.sum())
    fresh.fill_(3)
    return [bool(mask.all()), (mask[:, torch.arange(2, device=mask.device)] == 1).sum().item(), before, mask.tolist()]


def test_what_was_answered_once_is_not_waited_for_again(machine):
    mask = sent(MASK, device(0))
    answers = answers_on({"mask": mask})
    with answers.attached():
        first = ask(mask)
        asked = len(machine.waits)
        with answers.running():
            assert ask(mask) == first == [False, 4, 2, MASK.tolist()]
    # What a model has changed itself is asked anew.
    assert [wait[1] for wait in machine.waits[asked:]] == ["_local_scalar_dense"]


def test_a_batch_that_is_sent_to_where_it_is_stays_known(machine):
    mask = sent(MASK, device(0))
    answers = answers_on({"mask": mask})
    with answers.attached():
        assert not MASK.to("cpu").all()
        there = mask.to(device(0))
        waits = len(machine.waits)
        assert there.sum().item() == 5
        with answers.running():
            assert mask.sum().item() == 5
    assert len(machine.waits) == waits + 1


def test_what_is_told_cannot_be_changed_by_who_is_told():
    answers = answers_on({"mask": MASK})
    with answers.attached():
        MASK.tolist()[0].clear()
        with answers.running():
            assert MASK.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    "change",
    [
        lambda mask: mask.fill_(1),
        lambda mask: mask.view(-1)[3:].fill_(1),
        lambda mask: mask.__setitem__(mask == 0, 1),
        lambda mask: torch.add(mask, 1, out=mask),
        lambda mask: torch.ops.aten.fill_.Scalar(mask, 1),
        lambda mask: torch.clamp_(input=mask, min=1),
        lambda mask: mask.unsqueeze(1).expand(2, 1 << 18, 4).select(1, 0).add_(1),  # too large to be known
    ],
)
def test_a_batch_that_is_changed_is_asked_anew(change):
    mask = MASK.clone()
    answers = answers_on({"mask": mask})
    with answers.attached():
        assert not mask.all()
        change(mask)
        assert mask.all()
        with answers.running():
            assert mask.all()
            mask.zero_()
            assert not mask.any()


class Changing(nn.Module):
    def forward(self, hidden, mask):
        mask.fill_(1)
        return hidden


def test_what_a_layer_changes_is_asked_anew():
    mask, layer = MASK.clone(), Changing()
    answers = Answers({"mask": mask}, [layer], [0])
    with answers.attached():
        assert not mask.all()
        layer(torch.ones(1), mask)
        with answers.running():
            assert mask.all()


def test_a_mode_of_somebody_else_stays_on_and_ours_does_not_stay():
    class Counting(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    layer, mode = nn.Identity(), Counting()
    answers = Answers({"mask": MASK}, [layer], [0])
    with answers.attached(), mode:
        layer(MASK)
        before = mode.calls
        torch.zeros(1).add(1)
        assert mode.calls == before + 2
    assert _get_current_function_mode() is None


def test_a_mode_of_somebody_else_around_encoder_and_decoder_is_never_taken_off():
    class Other(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    encoder, decoder, other, asked = nn.Identity(), nn.Identity(), Other(), []
    answers = Answers({"mask": MASK}, [encoder, decoder], [0, 1])

    def run():
        encoder(MASK)
        asked.append(bool(MASK.all()))
        decoder(MASK)

    with answers.attached(), other:
        run()
        with answers.running():
            run()
            assert _get_current_function_mode() is other
        assert _get_current_function_mode() is other
    assert _get_current_function_mode() is None
    assert asked == [False, False]


def test_a_model_that_raises_leaves_nothing_behind():
    layer = nn.Identity()
    answers = Answers({"mask": MASK}, [layer], [0])

    def fail():
        with answers.attached():
            layer(MASK)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert _get_current_function_mode() is None
    assert not layer._forward_pre_hooks
    assert not layer._forward_hooks


def test_code_that_is_compiled_outside_of_layers_is_not_listened_to():
    model = SPECIMENS["llama"].build()
    layers = list(model.model.layers)
    assert not compiles_outside(model, layers)
    layers[0].mlp.compile(backend="eager")
    assert not compiles_outside(model, layers)
    model.model.embed_tokens.compile(backend="eager")
    assert compiles_outside(model, layers)
    model = SPECIMENS["llama"].build()
    model.config._attn_implementation = "flex_attention"
    assert compiles_outside(model, list(model.model.layers))


def test_what_is_drawn_or_left_empty_is_never_known():
    answers = answers_on({"mask": MASK})
    with answers.attached():
        torch.manual_seed(0)
        drawn = torch.randint_like(MASK, 1 << 30).tolist()
        torch.empty_like(MASK).fill_(1).tolist()
        with answers.running():
            assert torch.randint_like(MASK, 1 << 30).tolist() != drawn
            assert torch.empty_like(MASK).fill_(2).tolist() == [[2] * 4] * 2


def test_numbers_of_different_types_are_different():
    answers = answers_on({"mask": MASK})
    with answers.attached():
        assert [MASK[0, 1].tolist(), MASK[[0, 1]].tolist()] == [1, MASK.tolist()]
        assert MASK[:, : torch.tensor(2)].sum().item() == 4
        assert (MASK * 1).tolist() == MASK.tolist()
        with answers.running():
            assert str((MASK * 1.0).tolist()) != str(MASK.tolist())
            assert torch.full((2,), True).tolist() == [True, True]
            assert str(torch.full((2,), 1).tolist()) == "[1, 1]"


def test_only_devices_are_waited_for(machine):
    assert not is_waited_for({"mask": MASK, "name": "text"})
    assert is_waited_for({"mask": MASK, "ids": sent(MASK, device(0))})


def learned(name, *, num_blocks, on_device):
    """Return losses and weights after three steps, and what the last of them has waited for."""
    machine, specimen = Machine(), SPECIMENS[name]
    model = specimen.build()
    model.config.use_cache = False
    assembly = assemble(model, BlockLocalConfig(num_blocks=num_blocks), specimen.batch(0))
    losses = []
    with machine.running() if on_device else nullcontext():
        if on_device:
            assembly.module.to(device(0))
        optimizer = torch.optim.SGD(assembly.module.parameters(), lr=0.1)
        model.train()
        for step in range(3):
            batch = specimen.batch(step + 1)
            batch = {key: sent(value, device(0)) for key, value in batch.items()} if on_device else batch
            targets = assembly.read_targets(batch, seed=(step,))
            machine.forget()
            losses += stepped(assembly, optimizer, batch, targets, step=step)
            waits = list(machine.waits)
        state = {key: value.clone() for key, value in assembly.module.state_dict().items()}
    return [loss.item() for loss in losses], state, waits


def waits_of_the_model_itself(name):
    machine, specimen = Machine(), SPECIMENS[name]
    model = specimen.build()
    model.config.use_cache = False
    with machine.running():
        model.to(device(0)).train()
        batch = {key: sent(value, device(0)) for key, value in specimen.batch(3).items()}
        machine.forget()
        model(**batch).loss.backward()
        return list(machine.waits)


@pytest.mark.parametrize("name", ASKING)
def test_heads_that_borrow_wait_for_nothing_and_learn_the_same(name):
    losses, state, waits = learned(name, num_blocks=3, on_device=True)
    expected, weights, _ = learned(name, num_blocks=3, on_device=False)
    assert losses == expected
    assert all(torch.equal(state[key], value) for key, value in weights.items())
    assert 0 < len(waits) <= len(waits_of_the_model_itself(name))


def test_without_memory_every_head_waits(monkeypatch):
    monkeypatch.setattr("hf_blocklocal.teaching.step.is_waited_for", lambda inputs: False)
    waits = learned("bert", num_blocks=3, on_device=True)[-1]
    assert len(waits) == 3 * len(waits_of_the_model_itself("bert"))
