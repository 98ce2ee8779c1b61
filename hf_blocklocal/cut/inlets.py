"""Remember what enters each block in a forward pass, for losses that look back at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_blocklocal.anatomy.signals import given_hidden
from hf_blocklocal.cut.blocks import Boundaries
from hf_blocklocal.randomness import RandomState


@dataclass(frozen=True)
class Inlet:
    """What a block was given.

    Attributes:
        hidden: The hidden state, detached.
        random_state: Where the random streams stood then, so that the block can be run with the same dropout again.
    """

    hidden: Tensor
    random_state: RandomState


class Inlets:
    """Notes what enters the blocks below the last.

    Args:
        model: The model.
        boundaries: Its cut. While that is suspended, nothing is noted.
    """

    def __init__(self, model: nn.Module, boundaries: Boundaries) -> None:
        cut = boundaries.cut
        self._boundaries = boundaries
        self._firsts = [model.get_submodule(cut.layers[span.start]) for span in cut.spans[:-1]]
        self._seen: dict[int, Inlet] = {}

    def __getitem__(self, block: int) -> Inlet:
        """Return what a block was given; it must be the one that has been entered last."""
        return self._seen[block]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take notes in the forward pass that runs inside the `with`."""
        with ExitStack() as stack:
            stack.callback(self._seen.clear)
            for block, layer in enumerate(self._firsts):
                stack.callback(layer.register_forward_pre_hook(self._note(block), with_kwargs=True).remove)
            yield

    def _note(self, block: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._boundaries.is_suspended:
                return
            hidden = given_hidden(args, kwargs)
            assert hidden is not None, "the traced batch has shown a hidden state here"
            self._seen.clear()  # so that no block's input lives longer than the block needs it
            self._seen[block] = Inlet(hidden.detach(), RandomState.now(hidden.device))

        return hook
