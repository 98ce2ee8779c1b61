"""One block of a model at work by itself: stand-ins for the layers below it, and an end where it ends.

The model's own forward runs in every process, so masks, rotary embeddings and loops over layers stay the model's
business. Layers below the block hand their input on; the one right below returns what has come from there. The forward
pass is broken off where the block ends. Weights of other blocks are let go: they keep their names and shapes, on the
`meta` device, and take no memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_blocklocal.anatomy.embeddings import input_embedding, output_embedding
from hf_blocklocal.anatomy.lending import replaced_forward
from hf_blocklocal.anatomy.signals import hands_on, map_tensors
from hf_blocklocal.cut.blocks import Boundaries
from hf_blocklocal.cut.needs import Needs


class Stage:
    """The station of one block; see `cut.blocks.Station`.

    Args:
        model: The model.
        boundaries: Its cut.
        block: The block that is at work here.
        needs: What every block needs.
        forms: For each layer, 0 if it returns its hidden state, n if it returns a tuple of n that starts with it.
        receive: Returns what the block below has handed on.
        send: Takes what is for the block above.
    """

    def __init__(
        self,
        model: nn.Module,
        boundaries: Boundaries,
        block: int,
        *,
        needs: Needs,
        forms: tuple[int, ...],
        receive: Callable[[], Any],
        send: Callable[[Any], None],
    ) -> None:
        self.block = block
        self._boundaries = boundaries
        self._receive, self._send = receive, send
        self._forms = forms
        cut = boundaries.cut
        self._layers = [model.get_submodule(path) for path in cut.layers]
        self._span = cut.spans[block]
        above = block + 1
        self._wanted_above = needs.side_inputs[above] if above < cut.num_blocks else frozenset()
        self._needed = needs.side_inputs[block]
        self._given: dict[int | str, Any] = {}
        self._for_above: list[list[Any]] = []
        self._embeddings: list[nn.Embedding] = []
        embedding = input_embedding(model)
        if embedding is not None and not needs.parameters[block] & set(_names_in(model, embedding)):
            # Stacks of an encoder-decoder may have modules of their own for one and the same weight.
            tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
            self._embeddings = [table for table in tables if table.weight is embedding.weight]

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Let something stand in, inside the `with`, for the layers below the block."""
        with ExitStack() as stack:
            for table in self._embeddings:
                stack.enter_context(replaced_forward(table, self._unless_lent(table)))
            for index in range(self._span.start):
                forward = self._arrival if index == self._span.start - 1 else hands_on(self._forms[index])
                stack.enter_context(replaced_forward(self._layers[index], self._unless_suspended(index, forward)))
            if self.block < self._boundaries.cut.num_blocks - 1:
                last = self._layers[self._span.last]
                stack.callback(last.register_forward_pre_hook(self._note_for_above, with_kwargs=True).remove)
            yield

    def side_input(self, name: int | str, value: Any) -> Any:
        """Return what a layer is to be given for an input beside its hidden state that other blocks have made."""
        return self._given.get(name, value)

    def hand_on(self, output: Any) -> None:
        """Send what the last layer of the block has returned, with what layers above will be given beside it."""
        sides, self._for_above = self._for_above, []
        self._send([output, sides])

    def _arrival(self, *_args: Any, **_kwargs: Any) -> Any:
        output, sides = self._receive()
        self._given = {name: value for name, value in sides if name in self._needed}
        return output

    def _unless_lent(self, table: nn.Embedding) -> Callable[..., Tensor]:
        """Return a forward that gives every token the same, unless the table is here while nothing is cut."""
        own, width, dtype = table.forward, table.weight.shape[-1], table.weight.dtype
        here = next((p.device for layer in self._layers for p in layer.parameters() if not p.is_meta), None)

        def forward(ids: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
            if self._boundaries.is_suspended and not table.weight.is_meta:
                return own(ids)
            # Models that move ids to where the weight is have moved them to nowhere.
            return torch.zeros(*ids.shape, width, dtype=dtype, device=here if ids.is_meta else ids.device)

        return forward

    def _note_for_above(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._boundaries.is_suspended:
            return
        self._for_above = map_tensors(sides_of(args, kwargs, self._wanted_above), Tensor.detach)

    def _unless_suspended(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        own = self._layers[index].forward

        def run(*args: Any, **kwargs: Any) -> Any:
            return own(*args, **kwargs) if self._boundaries.is_suspended else forward(*args, **kwargs)

        return run


def sides_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Set[int | str]) -> list[list[Any]]:
    """Return those of a layer's arguments that the block above needs, each behind its position or name."""
    given = {**dict(enumerate(args)), **kwargs}
    return [[name, given[name]] for name in sorted(names, key=str) if name in given]


def unneeded_here(model: nn.Module, boundaries: Boundaries, block: int, needs: Needs) -> set[str]:
    """Return the names of the parameters that a process with one block can do without.

    Those are the parameters of other blocks' layers, and of input and output embeddings that the block does not use.
    Smaller parts outside the layers stay, because the model's forward runs through them.
    """
    embeddings = [input_embedding(model), output_embedding(model)]
    inside = {name for module in embeddings if module is not None for name in _names_in(model, module)}
    cut = boundaries.cut
    return {
        name
        for name, _ in model.named_parameters()
        if name not in needs.parameters[block] and (name in inside or cut.block_of_path(name) not in (None, block))
    }


def let_go_(parameters: Iterable[nn.Parameter]) -> None:
    """Move parameters to the `meta` device in place: the objects stay, their values and memory go."""
    gc.collect()  # graphs of traced batches still hold them
    for parameter in parameters:
        parameter.grad = None
        nothing = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        torch.utils.swap_tensors(parameter, nothing)


def move_(module: nn.Module, device: torch.device) -> None:
    """Move what a module has at hand to a device, and leave alone what is not here."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.device.type != "meta":
            tensor.data = tensor.data.to(device)


def _names_in(model: nn.Module, part: nn.Module) -> list[str]:
    mine = set(part.parameters())
    return [name for name, parameter in model.named_parameters() if parameter in mine]
