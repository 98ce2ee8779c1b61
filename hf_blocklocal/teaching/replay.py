"""Run one block a second time, from another input: the model's own forward, without the layers outside the block.

Layers below the block hand their input on, together with what they had returned beside it in the first run; the first
layer of the block is given the other input; and the forward ends where the block does. So nothing needs to know what
masks, rotary embeddings or position biases a model has. Dropout falls as it did in the first run, and the random
streams are left where they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from hf_blocklocal.anatomy.lending import read_only, replaced_forward, run_inside, statistics_kept, statistics_of
from hf_blocklocal.anatomy.signals import beside_hidden, first_tensor, given_hidden, map_tensors, with_hidden
from hf_blocklocal.cut.blocks import Boundaries
from hf_blocklocal.cut.inlets import Inlets
from hf_blocklocal.randomness import random_state_kept


class _BlockEnded(Exception):  # noqa: N818
    """Leaves a forward pass where a block ends. Never seen by a caller."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


class Replay:
    """The second run of a block of a model with a single stack of layers.

    Args:
        model: The model.
        boundaries: Its cut.
        inlets: Notes of the first run.
        forms: For each layer, 0 if it returns its hidden state, n if it returns a tuple of n that starts with it.
        reached: For each block, the names of the parameters that its own layers use.
    """

    def __init__(
        self,
        model: nn.Module,
        boundaries: Boundaries,
        inlets: Inlets,
        *,
        forms: Sequence[int],
        reached: Sequence[set[str]],
    ) -> None:
        self.model = model
        self.inlets = inlets
        self._boundaries = boundaries
        self._spans = boundaries.cut.spans
        self._layers = [model.get_submodule(path) for path in boundaries.cut.layers]
        self._forms = forms
        self._beside: dict[int, tuple[Any, ...]] = {}
        self._foreign = [
            [parameter for name, parameter in model.named_parameters() if name not in mine] for mine in reached
        ]
        normalising = [(name, module) for name, module in model.named_modules() if statistics_of(module)]
        self._normalising_elsewhere = [
            [module for name, module in normalising if boundaries.cut.block_of_path(name) != block]
            for block in range(len(reached))
        ]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note in the first run, inside the `with`, what layers return beside their hidden state."""
        with ExitStack() as stack:
            stack.callback(self._beside.clear)
            for index in range(self._spans[-1].start):
                if self._forms[index] > 1:
                    stack.callback(self._layers[index].register_forward_hook(self._note(index)).remove)
            yield

    def output(self, block: int, hidden: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Run a block whose first run is over.

        Args:
            block: The block.
            hidden: What its first layer is given, in the shape of the first run.
            inputs: The model's inputs; the labels are left out.

        Returns:
            Its output.
        """
        span, random_state = self._spans[block], self.inlets[block].random_state
        first, last = self._layers[span.start], self._layers[span.last]

        def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            random_state.set()
            return with_hidden(args, kwargs, hidden)

        def leave(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            raise _BlockEnded(first_tensor(output))

        with ExitStack() as stack:
            stack.enter_context(random_state_kept())
            stack.enter_context(self._boundaries.suspended())
            for index in range(span.start):
                stack.enter_context(replaced_forward(self._layers[index], self._stub(index)))
            stack.callback(first.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(last.register_forward_hook(leave).remove)
            try:
                run_inside(self.model, {name: value for name, value in inputs.items() if name != "labels"})
            except _BlockEnded as ended:
                return ended.output
        raise AssertionError("the forward pass did not come by the end of the block again")

    @contextmanager
    def read_only(self, block: int) -> Iterator[None]:
        """Keep gradients from all parameters that the block's own layers do not use, and statistics as they are."""
        with read_only(self._foreign[block]), statistics_kept(self._normalising_elsewhere[block]):
            yield

    def _note(self, index: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not self._boundaries.is_suspended:
                self._beside[index] = tuple(_detached(value) for value in beside_hidden(output))

        return hook

    def _stub(self, index: int) -> Callable[..., Any]:
        """Return a forward that hands its input on, beside what the layer had returned in the first run."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = given_hidden(args, kwargs)
            return hidden if self._forms[index] == 0 else (hidden, *self._beside.get(index, ()))

        return forward


def _detached(value: Any) -> Any:
    # Mappings are left alone: layers share them, and they would be changed in place.
    return map_tensors(value, Tensor.detach) if isinstance(value, Tensor | tuple | list) else value
