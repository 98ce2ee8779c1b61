"""The cut itself: stop the gradient where one block ends and the next begins, while the model's own forward runs.

Hooks are lent to the model for one forward pass and always taken back. What a block learns where it ends is not
decided here: the caller's `leave` is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from hf_blocklocal.anatomy.modes import hooks_outside_checkpoint, padding_kept
from hf_blocklocal.anatomy.signals import beside_hidden, first_tensor, hidden_name_in, made_elsewhere, map_tensors
from hf_blocklocal.cut.partition import Span
from hf_blocklocal.errors import BoundaryNotReachedError


Leave = Callable[[int, Tensor, tuple[Tensor, ...]], Tensor | None]
"""Called with the block that ends, its hidden state, and the logits of its routers, all still carrying gradient.

Returns what is handed on in place of the hidden state; nothing for the hidden state itself, detached.
"""


class EndOfBlock(BaseException):
    """Ends a forward pass where this process's block ends. Not an error, so nothing that handles errors stops it."""


class Station(Protocol):
    """Where one block of a model is at work, while the others are elsewhere.

    Attributes:
        block: The block.
    """

    block: int

    def standing_in(self) -> AbstractContextManager[None]:
        """Let something stand in, inside the `with`, for the layers below the block."""

    def side_input(self, name: int | str, value: Any) -> Any:
        """Return what a layer is to be given for an input beside its hidden state that other blocks have made."""

    def hand_on(self, output: Any) -> None:
        """Take what the last layer of the block has returned, detached, for the block above."""


@dataclass(frozen=True)
class Cut:
    """Where a model is cut.

    Attributes:
        layers: Dotted names of the layers in the order of execution.
        stacks: For each layer, which stack it belongs to.
        spans: The layers of each block, in forward order.
    """

    layers: tuple[str, ...]
    stacks: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.spans)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The first layer of every block but the first."""
        return tuple(span.start for span in self.spans[1:])

    def block_of_layer(self, layer: int) -> int:
        """Return the block that holds a layer."""
        return next(block for block, span in enumerate(self.spans) if layer in span)

    def block_of_path(self, path: str) -> int | None:
        """Return the block of the layer that holds a module or parameter, None if it lies outside the layers."""
        layer = self.layer_of_path(path)
        return None if layer is None else self.block_of_layer(layer)

    def layer_of_path(self, path: str) -> int | None:
        """Return the layer that holds a module or parameter, None if it lies outside the layers."""
        inside = (index for index, layer in enumerate(self.layers) if path == layer or path.startswith(f"{layer}."))
        return next(inside, None)

    def owns_stack_start(self, layer: int) -> bool:
        """Tell whether the block of a layer also holds the first layer of that layer's stack."""
        return self.stacks.index(self.stacks[layer]) in self.spans[self.block_of_layer(layer)]


@dataclass
class Trail:
    """What a forward pass has left so far for another one that starts where a block ends.

    Attributes:
        beside: What the layer that ends the block has returned beside its hidden state.
        ends: The hidden state that the last layer of each stack has handed on, by index of the layer; with history
            only of the block that is ending.
        sides: What layers of the block have been given beside their hidden state that weights of other blocks have
            made, such as the states of an encoder: by stack of layers, then by position or name; without history.
    """

    beside: tuple[Any, ...] = ()
    ends: dict[int, Tensor] = field(default_factory=dict)
    sides: dict[int, dict[int | str, Any]] = field(default_factory=dict)

    def detached(self) -> Trail:
        """Return the same without history."""
        ends = {index: end.detach() for index, end in self.ends.items()}
        return Trail(map_tensors(self.beside, Tensor.detach), ends, self.sides)


class Boundaries:
    """The hooks that cut a model.

    Attributes:
        station: Where one of its blocks is at work, if the others are elsewhere; None where all of them are here.
        layers: The layers, in the order of execution.
        exits: The last layer of every block but the last.
        carried: By stack of layers, positions and names of the side inputs that weights of other blocks have made and
            that are the same for all layers; a trail holds them. None are known at first.

    A block's hidden state is handed to `leave` where its last layer returns, and everything that layer returns goes on
    detached. Side inputs of a layer, such as position biases or the states of an encoder, are trained by the block
    that holds the first layer of the stack; in every other block they are detached on the way into a layer, unless a
    layer of the same block has made them.

    Args:
        model: The model to cut.
        cut: Where.
        routers: Dotted names of routers and the index of their logits, where the model balances their load.
    """

    def __init__(self, model: nn.Module, cut: Cut, routers: Mapping[str, int] | None = None) -> None:
        self.cut = cut
        self.station: Station | None = None
        self.carried: Mapping[int, Set[int | str]] = {}
        self.layers = [model.get_submodule(path) for path in cut.layers]
        self.exits = {block: self.layers[span.last] for block, span in enumerate(cut.spans[:-1])}
        stacks = cut.stacks
        self._ends_of_stacks = [index for index in range(len(stacks) - 1) if stacks[index] != stacks[index + 1]]
        self._routers = {
            model.get_submodule(path): (block, index)
            for path, index in (routers or {}).items()
            if (block := cut.block_of_path(path)) is not None and block < cut.num_blocks - 1
        }

    @property
    def first_taught(self) -> int:
        """The lowest block that is at work here."""
        return 0 if self.station is None else self.station.block

    @contextmanager
    def attached(
        self, leave: Leave, *, late: bool = False, observe: Callable[[int, int | str, Any], None] | None = None
    ) -> Iterator[None]:
        """Cut the forward pass that runs inside the `with`.

        Args:
            leave: Called at the end of every block but the last.
            late: Whether what is handed on is known only when `leave` has returned.
            observe: Told, of every layer whose block does not hold the first layer of its stack, what it is given
                beside its hidden state that no layer of its block has made: the layer, position or name, value.

        Raises:
            BoundaryNotReachedError: If the forward pass did not come by the end of every block exactly once.
        """
        station = self.station
        here = range(self.cut.num_blocks) if station is None else range(station.block, station.block + 1)
        visit = self._visit = _Visit(here[: self.cut.num_blocks - 1 - here.start], leave, station, late, observe)
        with ExitStack() as stack:
            stack.enter_context(padding_kept())
            for layer in self.layers:
                stack.enter_context(hooks_outside_checkpoint(layer))
            for router, (block, index) in self._routers.items():
                if block in here:
                    stack.callback(router.register_forward_hook(visit.tap(block, index), prepend=True).remove)
            for index in range(self.cut.spans[here[0]].start, self.cut.spans[here[-1]].stop if self.layers else 0):
                if not self.cut.owns_stack_start(index):
                    layer, of_stack = self.layers[index], self.cut.stacks[index]
                    enter = visit.enter(index, of_stack, self.carried.get(of_stack, frozenset()))
                    stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
                    stack.callback(layer.register_forward_hook(visit.remember).remove)
            for block in visit.expected:
                stack.callback(self.exits[block].register_forward_hook(visit.leave(block)).remove)
            for index in self._ends_of_stacks:  # behind the hooks of the blocks, to see what those hand on
                stack.callback(self.layers[index].register_forward_hook(visit.note_end(index)).remove)
            if station is not None:
                stack.enter_context(station.standing_in())
            stack.callback(visit.forget)
            yield
            visit.check_complete()

    @property
    def trail(self) -> Trail:
        """What the forward pass under way has left so far."""
        return self._visit.trail

    @property
    def is_suspended(self) -> bool:
        """Whether the layers run as if they were not cut."""
        return self._visit.suspended

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let the layers run inside the `with` as if they were not cut, in the middle of a forward pass that is."""
        self._visit.suspended = True
        try:
            yield
        finally:
            self._visit.suspended = False


class _Visit:
    """What the hooks of one forward pass remember."""

    def __init__(
        self,
        expected: range,
        leave: Leave,
        station: Station | None,
        late: bool,
        observe: Callable[[int, int | str, Any], None] | None,
    ) -> None:
        self.expected = expected
        self._left: list[int] = []
        self._leave = leave
        self._station = station
        self._late = late
        self._observe = observe
        self._made_here: list[Tensor] = []
        self._router_logits: list[Tensor] = []
        self._leaving = False
        self.suspended = False
        self.trail = Trail()

    def enter(self, index: int, stack: int, carried: Set[int | str]) -> Callable[..., Any]:
        """Detach the side inputs of a layer that other blocks have made, and note those that are carried."""

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            if self.suspended:
                return None
            made_here = {id(tensor) for tensor in self._made_here}

            def detach(tensor: Tensor) -> Tensor:
                return tensor.detach() if tensor.requires_grad and id(tensor) not in made_here else tensor

            def side(name: int | str, value: Any) -> Any:
                from_elsewhere = made_elsewhere(value, made_here)
                if from_elsewhere and self._observe is not None:
                    self._observe(index, name, value)
                if from_elsewhere and self._station is not None:
                    value = self._station.side_input(name, value)
                value = map_tensors(value, detach)
                if from_elsewhere and name in carried:
                    self.trail.sides.setdefault(stack, {})[name] = value
                return value

            hidden_name = None if args else hidden_name_in(kwargs)
            sides = {name: side(name, value) for name, value in kwargs.items() if name != hidden_name}
            return (*args[:1], *(side(place, value) for place, value in enumerate(args[1:], 1))), {**kwargs, **sides}

        return hook

    def remember(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note what a layer has made, for the later layers of its block."""
        if self.suspended:
            return
        alone = self._station is not None
        map_tensors(output, lambda tensor: self._made_here.append(tensor) if tensor.requires_grad or alone else None)

    def tap(self, block: int, index: int) -> Callable[..., Any]:
        """Keep a router's logits for the loss of its block, as a tensor that can be detached in place later."""

        def hook(router: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            parts = [output] if isinstance(output, Tensor) else list(output)
            position = 0 if isinstance(output, Tensor) else index
            parts[position] = parts[position].clone()
            if not self._leaving:  # else a checkpointed layer is being recomputed
                self._router_logits.append(parts[position])
            return parts[0] if isinstance(output, Tensor) else type(output)(parts)

        return hook

    def note_end(self, index: int) -> Callable[..., Any]:
        """Note what the last layer of a stack hands on."""

        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not self.suspended and not self._leaving:  # else a checkpointed layer is being recomputed
                self.trail.ends[index] = first_tensor(output)

        return hook

    def leave(self, block: int) -> Callable[..., Any]:
        """Let the block learn, then hand on what it made without its history."""

        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self.suspended:
                return output
            self._leaving = True
            hidden = first_tensor(output)
            self.trail.beside = beside_hidden(output)
            if self._station is not None and not self._late:
                self._station.hand_on(map_tensors(output, Tensor.detach))
            handed_on = self._leave(block, hidden, tuple(self._router_logits))
            self._leaving = False
            self._left.append(block)
            for logits in self._router_logits:
                logits.detach_()
            self._router_logits.clear()
            self._made_here.clear()
            self.trail = Trail(ends=self.trail.detached().ends)
            output = map_tensors(
                output, lambda tensor: handed_on if handed_on is not None and tensor is hidden else tensor.detach()
            )
            if self._station is not None:
                if self._late:
                    self._station.hand_on(output)
                raise EndOfBlock
            return output

        return hook

    def forget(self) -> None:
        """Let go of all tensors."""
        self._made_here.clear()
        self._router_logits.clear()
        self.trail = Trail()

    def check_complete(self) -> None:
        if self._left != list(self.expected):
            raise BoundaryNotReachedError(
                f"A forward pass came by the ends of blocks {self._left}, not {list(self.expected)}: a last layer of "
                "a block was skipped or ran twice. Random layer dropping and re-entrant checkpointing do this, and "
                "trainers that run the model twice for a batch (in evaluations: evaluate_blocks=False)."
            )
