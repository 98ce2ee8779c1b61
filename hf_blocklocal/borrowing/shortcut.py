"""Run what lies above a block with only some of its layers, read-only: the model itself as the head of a block.

The model's own forward runs a second time, from the end of the block on. Layers that are left out hand their input on,
and so is what the layer before them has returned beside it, such as a position bias; or they run, and gradients go
straight past them. Nothing needs to know what masks, rotary embeddings, norms or task heads the model has. What other
blocks have made for the layers of a block, such as an encoder's states for a block in the decoder, is as it was made;
above a block in the encoder lie the rest of that and the whole decoder. Parameters outside the block get no gradient.
With all layers above, the loss has the very gradient of backpropagation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from hf_blocklocal.anatomy.asking import confined_to, logits_of
from hf_blocklocal.anatomy.lending import read_only, replaced_forward, statistics_kept, statistics_of
from hf_blocklocal.anatomy.modes import hooks_outside_checkpoint
from hf_blocklocal.anatomy.signals import beside_hidden, first_tensor, given_hidden
from hf_blocklocal.borrowing.copies import Copies
from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.cut.blocks import Cut, Trail
from hf_blocklocal.cut.trace import Trace


def borrowed_layers(cut: Cut, block: int, count: int) -> tuple[int, ...]:
    """Choose the layers that the head of a block borrows.

    Args:
        cut: Where the model is cut.
        block: The block.
        count: Layers to borrow, at most all above the block; 0 for none.

    Returns:
        Indices of layers above the block, evenly spread, the last layer among them.
    """
    first = cut.spans[block].stop
    above = len(cut.layers) - first
    count = min(count, above)
    return tuple(first + (number + 1) * above // count - 1 for number in range(count))


def learns_past_layers(cut: Cut, block: int, config: BlockLocalConfig) -> bool:
    """Tell whether the head of a block learns with layers above it that it does not borrow."""
    above = len(cut.layers) - cut.spans[block].stop
    return config.head_bypass == "straight_through" and min(config.head_layers, above) < above


class Shortcut:
    """The way from the end of a block to the model's logits.

    Attributes:
        copies: Copies of what lies above the blocks, to be used in place of the model's own weights; None for those.

    Args:
        model: The model.
        cut: Where it is cut.
        trace: What its layers return.
        count: Layers that every head borrows.
        reached: For each block, the names of the parameters that its own layers use.
        confines: Whether the language-model head may be confined to some tokens.
        straight_through: Whether layers that a head does not borrow run all the same, without a backward pass, so that
            its loss is the model's own. Else they are left out.
    """

    def __init__(
        self,
        model: nn.Module,
        cut: Cut,
        trace: Trace,
        count: int,
        reached: Sequence[set[str]],
        *,
        confines: bool = False,
        straight_through: bool = False,
    ) -> None:
        self.model = model
        self.copies: Copies | None = None
        self.confines = confines
        self.straight_through = straight_through
        self._learning: Collection[nn.Parameter] = ()
        self._cut = cut
        self._trace = trace
        self._layers = [model.get_submodule(path) for path in cut.layers]
        self._kept = [borrowed_layers(cut, block, count) for block in range(cut.num_blocks - 1)]
        self._foreign = self._all_but(reached)
        self._normalising = [module for module in model.modules() if statistics_of(module)]

    def through(self, model: nn.Module, *, learning: Collection[nn.Parameter] = ()) -> Shortcut:
        """Return the same way through another model of the same structure.

        Args:
            model: The model.
            learning: Those of its parameters that belong to the head; the others nobody trains by it.
        """
        other = copy(self)
        other.model, other.copies, other._learning = model, None, learning
        other._layers = [model.get_submodule(path) for path in self._cut.layers]
        other._foreign = [[] for _ in self._foreign]
        other._normalising = [module for module in model.modules() if statistics_of(module)]
        return other

    def with_own(self, reached: Sequence[set[str]]) -> Shortcut:
        """Return the same way, where other parameters than so far are each block's own to train.

        Args:
            reached: For each block, the names of those parameters.
        """
        other = copy(self)
        other._foreign = self._all_but(reached)
        return other

    def _all_but(self, reached: Sequence[set[str]]) -> list[list[nn.Parameter]]:
        named = list(self.model.named_parameters())
        return [[parameter for name, parameter in named if name not in mine] for mine in reached]

    def kept_layers(self, block: int) -> tuple[int, ...]:
        """Return the layers that the head of a block borrows."""
        return self._kept[block]

    def lent_weights(self, owners: Mapping[str, int]) -> list[set[str]]:
        """Return, for each block but the last, the names of the parameters that its head uses and a later block owns.

        Args:
            owners: The block that owns each parameter of the model.
        """
        stacks = self._cut.stacks
        openers = [
            index for index, lends in enumerate(self._trace.lends) if lends and index == stacks.index(stacks[index])
        ]
        layers = {name: self._cut.layer_of_path(name) for name in owners}
        return [
            {
                name
                for name, owner in owners.items()
                if owner > block
                and (self.straight_through or layers[name] is None or layers[name] in (*kept, *openers))
            }
            for block, kept in enumerate(self._kept)
        ]

    def taught_weights(self, lent: Sequence[set[str]]) -> list[set[str]]:
        """Return which of the parameters that each head uses its loss has a gradient for: not layers that it bypasses.

        Args:
            lent: For each block but the last, the names of the parameters of later blocks that its head uses.
        """
        return [
            {name for name in names if self._cut.layer_of_path(name) in (None, *kept)}
            for names, kept in zip(lent, self._kept, strict=True)
        ]

    def logits(
        self,
        block: int,
        hidden: Tensor,
        inputs: Mapping[str, Any],
        trail: Trail,
        tokens_C: Tensor | None = None,
        *,
        shortened: bool = False,
    ) -> Tensor:
        """Run the model from the end of a block.

        Args:
            block: The block.
            hidden: Its output, (B, S, D).
            inputs: The model's inputs; the labels are left out, unless a decoder's inputs are made from them.
            trail: What the forward pass under way has left so far.
            tokens_C: Tokens to which a language-model head is confined; None for the whole vocabulary.
            shortened: Whether layers that the head does not borrow are left out even if it learns with them.

        Returns:
            The model's logits, (B, C) or (B, S, C); of spans, those of start and end, (B, S, 2).
        """
        given, end = self._given(block, hidden, trail), self._cut.spans[block].last
        sides = trail.sides.get(self._cut.stacks[end])
        beside = _Beside(self._cut.stacks)
        with ExitStack() as stack:
            if tokens_C is not None:
                stack.enter_context(confined_to(self.model.get_output_embeddings(), tokens_C))
            for index, layer in enumerate(self._layers):
                if sides and index > end and self._cut.stacks[index] == self._cut.stacks[end]:
                    # Outside of a checkpoint, which would be computed again without it.
                    stack.enter_context(hooks_outside_checkpoint(layer))
                    stack.callback(layer.register_forward_pre_hook(_giving(sides), with_kwargs=True).remove)
                if index in given:
                    stack.enter_context(replaced_forward(layer, _returning(given[index])))
                elif index not in self._kept[block]:
                    below = index < end
                    if self.straight_through and not shortened and not below:
                        forward = _straight_through(layer.forward)
                    else:
                        forward = self._passing_on(index, beside, bypassed=below)
                    stack.enter_context(replaced_forward(layer, forward))
                stack.callback(layer.register_forward_hook(beside.note(index)).remove)
            return logits_of(self.model, inputs)

    def _given(self, block: int, hidden: Tensor, trail: Trail) -> dict[int, Any]:
        """Return what layers have put out already: the last of the block, and those of the stacks before."""
        end = self._cut.spans[block].last
        known = {index: (state, *[None] * (self._trace.forms[index] - 1)) for index, state in trail.ends.items()}
        known[end] = (hidden, *trail.beside)
        return {index: output[0] if self._trace.forms[index] == 0 else output for index, output in known.items()}

    def _passing_on(self, index: int, beside: _Beside, *, bypassed: bool) -> Callable[..., Any]:
        """Return the forward of a layer that is left out, or that lies before the end of the block."""
        form, forward = self._trace.forms[index], self._layers[index].forward

        def pass_on(*args: Any, **kwargs: Any) -> Any:
            hidden = given_hidden(args, kwargs)
            if form == 0:
                return hidden
            handed_on = beside.before(index)
            if handed_on is None and self._trace.lends[index] and not bypassed:
                # Only the first layer of a stack knows what all of them are to be given beside the hidden state.
                with torch.no_grad():
                    handed_on = beside_hidden(forward(*args, **kwargs))
            return (hidden, *(handed_on or [None] * (form - 1)))

        return pass_on

    @contextmanager
    def lent(self, block: int, *, head_only: bool = False) -> Iterator[None]:
        """Lend a block what lies above it, read-only, from the forward pass of its head to the end of the backward.

        Args:
            block: The block. Parameters that its own layers do not use get no gradient, and no running statistics of
                the model change.
            head_only: Whether no parameter of the model gets any.
        """
        copies = self.copies.in_use(block) if self.copies is not None else nullcontext()
        if head_only:
            foreign = [parameter for parameter in self.model.parameters() if parameter not in self._learning]
        else:
            foreign = self._foreign[block]
        with read_only(foreign), copies, statistics_kept(self._normalising):
            yield


class _Beside:
    """What the layers of each stack return beside their hidden state, in one run.

    Args:
        stacks: For each layer, which stack it belongs to.
    """

    def __init__(self, stacks: Sequence[int]) -> None:
        self._stacks = stacks
        self._last: dict[int, tuple[Any, ...]] = {}

    def note(self, index: int) -> Callable[..., None]:
        """Return a hook that notes what a layer returns."""

        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._last[self._stacks[index]] = beside_hidden(output)

        return hook

    def before(self, index: int) -> tuple[Any, ...] | None:
        """Return what the layer before has returned; nothing if it is the first of its stack."""
        return self._last.get(self._stacks[index])


def _straight_through(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that computes the same, and whose backward takes the layer for the identity.

    This is the straight-through estimator of Bengio et al. (2013), arXiv 1308.3432, with a whole layer in the place
    of their threshold.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        hidden = given_hidden(args, kwargs)
        with torch.no_grad():
            output = forward(*args, **kwargs)
        computed = first_tensor(output) + (hidden - hidden.detach())  # zero, but for its gradient
        return computed if isinstance(output, Tensor) else (computed, *beside_hidden(output))

    return run


def _giving(sides: Mapping[int | str, Any]) -> Callable[..., Any]:
    """Return a hook that gives a layer what is known of its side inputs."""

    def hook(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        args = tuple(sides.get(place, value) for place, value in enumerate(args))
        return args, {name: sides.get(name, value) for name, value in kwargs.items()}

    return hook


def _returning(output: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return output

    return forward
