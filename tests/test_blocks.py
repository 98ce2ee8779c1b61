"""A borrowed model is cut for one forward pass, every gradient stays in its block, and no hook stays behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_blocklocal.cut.blocks import Boundaries, Cut
from hf_blocklocal.cut.partition import Span, spans_from_boundaries
from hf_blocklocal.cut.trace import reached_parameters
from hf_blocklocal.errors import BoundaryNotReachedError


def test_the_parameters_that_a_backward_pass_would_reach_are_those_it_reaches():
    used, unused, frozen = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    output = used(frozen(used(torch.ones(1, 2)))) + unused(torch.ones(1, 2)).detach()
    assert reached_parameters(output) == {used.weight, used.bias}


# ---- A cut ----


def test_a_cut_knows_the_block_of_every_layer_and_of_what_is_inside():
    cut = Cut(("h.1", "h.10", "g.0"), (0, 0, 1), (Span(0, 1), Span(1, 3)))
    assert cut.num_blocks == 2
    assert [cut.block_of_layer(layer) for layer in range(3)] == [0, 1, 1]
    assert cut.block_of_path("h.1") == 0
    assert cut.block_of_path("h.1.mlp.weight") == 0
    assert cut.block_of_path("h.10.mlp.weight") == 1
    assert cut.block_of_path("h") is None
    assert cut.block_of_path("head.weight") is None


def test_a_block_owns_the_start_of_a_stack_only_where_it_holds_its_first_layer():
    cut = Cut(tuple("abcdef"), (0, 0, 0, 1, 1, 1), (Span(0, 2), Span(2, 5), Span(5, 6)))
    assert [cut.owns_stack_start(layer) for layer in range(6)] == [True, True, False, True, True, False]


# ---- A model of our own, to see every rule by itself ----


class Link(nn.Module):
    """A layer that returns its hidden state and a side state, and uses the one it was given."""

    def __init__(self):
        super().__init__()
        self.main = nn.Linear(3, 3)
        self.side = nn.Linear(3, 3)

    def forward(self, hidden_states, side=None, shared=None):
        hidden_states = torch.tanh(self.main(hidden_states))
        for extra in (side, None if shared is None else shared["bias"]):
            hidden_states = hidden_states if extra is None else hidden_states + extra
        return hidden_states, self.side(hidden_states)


class Chain(nn.Module):
    """Four links, each given the side state of the one `lag` before it and a bias that stands in front of all."""

    def __init__(self, by_name=False, order=(0, 1, 2, 3), lag=1):
        super().__init__()
        self.front = nn.Linear(3, 3)
        self.links = nn.ModuleList(Link() for _ in range(4))
        self.by_name, self.order, self.lag = by_name, order, lag

    def forward(self, inputs):
        bias = self.front(inputs)
        hidden, sides = inputs, [None] * self.lag
        for index in self.order:
            given = {"side": sides[-self.lag], "shared": {"bias": bias}}
            if self.by_name:
                hidden, side = self.links[index](hidden_states=hidden, **given)
            else:
                hidden, side = self.links[index](hidden, *given.values())
            sides.append(side)
        return hidden


def chain(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Chain(**options)


def chain_boundaries(model, *boundaries):
    cut = Cut(tuple(f"links.{index}" for index in range(4)), (0,) * 4, tuple(spans_from_boundaries(4, boundaries)))
    return Boundaries(model, cut)


def reach_of_blocks(model, boundaries, run):
    """Return for each block the names of the parameters with a gradient from a loss at its end."""
    reached = []

    def learn(_block, hidden, _router_logits=()):
        model.zero_grad(set_to_none=True)
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
        (hidden * weights).sum().backward()
        named = model.named_parameters()
        reached.append({name for name, p in named if p.grad is not None and p.grad.abs().max() > 0})

    with boundaries.attached(learn):
        output = run()
    learn(boundaries.cut.num_blocks - 1, output)
    return reached


def names(model, *prefixes):
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


INPUTS = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.3, -0.7]])


@pytest.mark.parametrize("by_name", [False, True], ids=["by position", "by name"])
def test_every_parameter_of_a_chain_learns_from_one_block_only(by_name):
    model = chain(by_name=by_name)
    first, second = reach_of_blocks(model, chain_boundaries(model, 2), lambda: model(INPUTS))
    # The side state of link 1 goes on without its history, that of link 2 is used within its block, and nobody uses
    # that of link 3. The bias in front is trained where the stack begins.
    assert first == names(model, "front", "links.0", "links.1.main")
    assert second == names(model, "links.2", "links.3.main")


@pytest.mark.parametrize("by_name", [False, True], ids=["by position", "by name"])
def test_blocks_of_one_layer_leave_no_side_state_to_learn_from(by_name):
    model = chain(by_name=by_name)
    reached = reach_of_blocks(model, chain_boundaries(model, 1, 2, 3), lambda: model(INPUTS))
    assert reached == [names(model, "front", "links.0.main")] + [names(model, f"links.{k}.main") for k in (1, 2, 3)]


def test_a_side_state_that_skips_a_boundary_is_handed_on_without_history():
    model = chain(lag=2)
    first, second, third = reach_of_blocks(model, chain_boundaries(model, 1, 3), lambda: model(INPUTS))
    assert first == names(model, "front", "links.0.main")
    assert second == names(model, "links.1.main", "links.2.main")
    assert third == names(model, "links.3.main")


def test_a_single_block_is_not_touched():
    model = chain()
    boundaries = chain_boundaries(model)
    with boundaries.attached(lambda *_: pytest.fail("there is no boundary")):
        assert not any(hooks_of(model))
        output = model(INPUTS)
    assert torch.equal(output, model(INPUTS))


def test_leave_is_told_block_after_block_with_the_hidden_state_and_its_history():
    model, told = chain(), []
    with chain_boundaries(model, 1, 3).attached(lambda *what: told.append(what)):
        model(INPUTS)
    assert [block for block, _, _ in told] == [0, 1]
    assert all(hidden.shape == INPUTS.shape and hidden.requires_grad for _, hidden, _ in told)
    assert all(router_logits == () for _, _, router_logits in told)


def test_what_a_block_hands_on_is_what_it_made():
    model, hidden = chain(), []
    with chain_boundaries(model, 1, 2, 3).attached(lambda _block, state, _logits: hidden.append(state.detach())):
        output = model(INPUTS)
    assert torch.equal(output, model(INPUTS))
    assert all(not torch.equal(one, other) for one, other in zip(hidden, hidden[1:], strict=False))


# ---- Hooks are given back ----


def hooks_of(model):
    return [
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    ]


def test_hooks_are_there_during_the_pass_and_gone_after_it():
    model = chain()
    boundaries = chain_boundaries(model, 2)
    with boundaries.attached(lambda *_: None):
        assert sum(hooks_of(model)) > 0
        model(INPUTS)
    assert sum(hooks_of(model)) == 0


def test_hooks_of_others_stay():
    model = chain()
    model.links[1].register_forward_hook(lambda *_: None)
    before = hooks_of(model)
    with chain_boundaries(model, 2).attached(lambda *_: None):
        model(INPUTS)
    assert hooks_of(model) == before


def fail(*_):
    raise ArithmeticError("on purpose")


def test_hooks_are_gone_after_an_exception_in_the_forward_pass():
    model = chain()
    model.links[2].main.forward = fail
    with pytest.raises(ArithmeticError, match="on purpose"), chain_boundaries(model, 2).attached(lambda *_: None):
        model(INPUTS)
    assert sum(hooks_of(model)) == 0


def test_hooks_are_gone_after_an_exception_in_leave():
    model = chain()
    with pytest.raises(ArithmeticError, match="on purpose"), chain_boundaries(model, 2).attached(fail):
        model(INPUTS)
    assert sum(hooks_of(model)) == 0


def test_a_model_can_be_cut_again_after_an_exception():
    model = chain()
    boundaries = chain_boundaries(model, 2)
    with pytest.raises(ArithmeticError), boundaries.attached(fail):
        model(INPUTS)
    assert len(reach_of_blocks(model, boundaries, lambda: model(INPUTS))) == 2


# ---- Boundaries that are missed ----


@pytest.mark.parametrize(
    ("order", "passed"),
    [((0, 2, 3), "[1]"), ((0, 3), "[]"), ((0, 1, 1, 2, 3), "[0, 0, 1]"), ((2, 1, 3), "[1, 0]")],
    ids=["one skipped", "both skipped", "run twice", "out of order"],
)
def test_a_boundary_that_is_not_passed_exactly_once_is_an_error(order, passed):
    model = chain(order=order)
    with pytest.raises(BoundaryNotReachedError) as error, chain_boundaries(model, 2, 3).attached(lambda *_: None):
        model(INPUTS)
    assert str(error.value) == (
        f"A forward pass came by the ends of blocks {passed}, not [0, 1]: a last layer of a block was skipped or ran "
        "twice. Random layer dropping and re-entrant checkpointing do this, and trainers that run the model twice for "
        "a batch (in evaluations: evaluate_blocks=False)."
    )
    assert sum(hooks_of(model)) == 0


def test_a_layer_skipped_inside_a_block_leaves_its_boundary_alone():
    model = chain(order=(1, 2, 3))
    reached = reach_of_blocks(model, chain_boundaries(model, 2), lambda: model(INPUTS))
    assert reached == [names(model, "front", "links.1.main"), names(model, "links.2", "links.3.main")]


def test_a_with_without_a_forward_pass_is_an_error():
    model = chain()
    with pytest.raises(BoundaryNotReachedError), chain_boundaries(model, 2).attached(lambda *_: None):
        pass
    assert sum(hooks_of(model)) == 0
