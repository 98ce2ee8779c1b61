"""Copies of the layers above a block for its head to borrow, taken anew every few steps, some steps late.

Backpropagation would send a gradient down with every step; here weights go down now and then. With `every` steps from
one copy to the next and a `lag`, at steps t that are multiples of `every` the heads take the weights as they stood
after step t - lag, so no block has to wait for those above it. A `decay` makes the copies move only a part of the way:
an exponential moving average, as in momentum networks. Copies may learn in between, each with the block whose head
borrows it: what is late then is only what the others have learned. Where blocks are in several processes, the weights
come by an exchange, at the same steps.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_blocklocal.anatomy.lending import statistics_of
from hf_blocklocal.errors import CopiesMismatchError
from hf_blocklocal.fitting import first_misfit


COPIES_NAME = "block_local_copies.safetensors"


class Exchange(Protocol):
    """The way weights take between processes that own them and those that borrow them."""

    def give(self, used_at: int) -> None:
        """Send weights of this process, as they are now, to where they come into use at a step."""

    def take(self, used_at: int) -> dict[str, Tensor]:
        """Return the weights that come into use here at a step, waiting for them if need be."""


class Copies:
    """What the heads of all blocks borrow: each weight copied once, and those that learn once for each head.

    Running statistics beside those weights, such as those of batch norms, are copied with them. Other buffers stay the
    model's own, and so do weights that are frozen when the copies are made.

    Attributes:
        file_name: Where the copies are kept in a checkpoint.
        live: What is copied, by name, as it is in the model.
        lent: For each block but the last, the names of what its head borrows of that.
        beside: For each of the running statistics, the name of a parameter of its module.
        learning: For each block but the last, the copies that learn with it, by the name of what they are copies of.

    Args:
        model: The model.
        lent: For each block but the last, the names of the parameters that its head borrows.
        every: Steps from one copy to the next; 0 takes no others than those that training starts with.
        lag: Steps that a copy is old when it is taken into use.
        decay: Share of the old copy that stays.
        learns: For each block but the last, the names of those that learn with it in between; default: none do.
        of_all: Whether the copies of all heads are to be here. Else they take no memory until `of_block` says which.
    """

    file_name = COPIES_NAME

    def __init__(
        self,
        model: nn.Module,
        lent: Sequence[set[str]],
        *,
        every: int,
        lag: int = 0,
        decay: float = 0.0,
        learns: Sequence[set[str]] = (),
        of_all: bool = True,
    ) -> None:
        self.every, self.lag, self.decay = every, lag, decay
        names = set().union(*lent)
        self.live: dict[str, Tensor] = {
            name: p for name, p in model.named_parameters() if name in names and p.requires_grad
        }
        name_of = {parameter: name for name, parameter in self.live.items()}
        places = [
            (module._parameters, leaf, name_of[parameter])
            for module in model.modules()
            for leaf, parameter in module._parameters.items()
            if parameter in name_of
        ]
        self.beside: dict[str, str] = {}
        for path, module in model.named_modules():
            lent_here = [f"{path}.{leaf}" for leaf in module._parameters if f"{path}.{leaf}" in names]
            for leaf, tensor in statistics_of(module).items() if lent_here else ():
                if tensor.is_floating_point():
                    name = f"{path}.{leaf}"
                    self.live[name], self.beside[name] = tensor, lent_here[0]
                    places.append((module._buffers, leaf, name))
        self.lent = [{name for name in self.live if self.beside.get(name, name) in mine} for mine in lent]
        self.learning = [
            {name: nn.Parameter(tensor.detach()) for name, tensor in self.live.items() if name in mine}
            for mine in learns or [set() for _ in lent]
        ]
        still = set().union(*(mine - learning.keys() for mine, learning in zip(self.lent, self.learning, strict=True)))
        self._copies = {name: _stand_in(tensor) for name, tensor in self.live.items() if name in still}
        if of_all:
            self._make_apart_()
        self._places = [[place for place in places if place[2] in mine] for mine in self.lent]
        self._waiting: dict[int, dict[str, Tensor] | None] = {}
        self._exchange: Exchange | None = None
        self._step = -1

    @property
    def most_under_way(self) -> int:
        """How often weights may have set out that are not yet in use, if those who borrow are not behind."""
        return 2 + (self.lag // self.every if self.every > 0 else 0)

    def of_block(self, block: int, exchange: Exchange) -> None:
        """Keep only what the head of one block borrows, and get it from elsewhere from now on.

        Args:
            block: The block.
            exchange: The way to the processes that own the weights, and to those that borrow from this one.
        """
        self.learning = [learning if number == block else {} for number, learning in enumerate(self.learning)]
        mine = self.lent[block] - self.learning[block].keys() if block < len(self.lent) else set()
        self._copies = {name: copy for name, copy in self._copies.items() if name in mine}
        self._make_apart_()
        self._exchange = exchange

    def _make_apart_(self) -> None:
        """Give copies memory of their own, so that they no longer are what they are copies of."""
        for _, copy in self._all():
            copy.data = copy.data.clone()

    def move_(self, device: torch.device) -> None:
        """Move the copies to a device; those that learn move with their head."""
        for copy in self._copies.values():
            copy.data = copy.data.to(device)

    def __getitem__(self, parameter: nn.Parameter) -> Tensor:
        """Return the copy of a weight, or the weight itself where there is none."""
        return next((copy for key, copy in self._all() if self.live[key] is parameter), parameter)

    def _all(self) -> Iterator[tuple[str, Tensor]]:
        """Return all copies, each with the key of what it is a copy of."""
        yield from self._copies.items()
        for block, learning in enumerate(self.learning):
            for name, copy in learning.items():
                yield self._key(block, name), copy

    def _key(self, block: int, name: str) -> str:
        """Return the key, in `live` and among what waits, of what a block borrows."""
        return name

    @torch.no_grad()
    def advance_(self, step: int) -> None:
        """Take copies that are due. Call it before each step; calls for the same step after the first do nothing.

        Args:
            step: Optimizer steps taken so far. At 0 everything begins anew, with the weights as they are.
        """
        if step == self._step:
            return
        self._step = step
        if step == 0:
            self._waiting.clear()
            self._set_out(0, now=True)
            self._arrive(0, decay=0.0)
        used_at = step + self.lag
        if self.every > 0 and used_at % self.every == 0 and used_at > 0:
            # Without lag they are used here and now, so nothing needs to be set aside.
            self._set_out(used_at, now=self.lag == 0)
        self._arrive(step, decay=self.decay)

    def _set_out(self, used_at: int, *, now: bool) -> None:
        """Let weights set out that come into use at a step."""
        if self._exchange is not None:
            self._exchange.give(used_at)
            self._waiting[used_at] = None
        else:
            self._waiting[used_at] = {name: p.detach() if now else p.detach().clone() for name, p in self.live.items()}

    def _arrive(self, step: int, *, decay: float) -> None:
        """Take weights into use that set out for a step, if any did."""
        if step not in self._waiting:
            return
        weights = self._waited_for(step)
        del self._waiting[step]
        for key, copy in self._all():
            weight = weights[key].to(copy.device)
            copy.lerp_(weight, 1 - decay) if decay > 0 else copy.copy_(weight)

    def fetch(self) -> None:
        """Wait for all weights that are on their way, so that nothing is left on it."""
        for step in self._waiting:
            self._waited_for(step)

    def _waited_for(self, step: int) -> dict[str, Tensor]:
        weights = self._waiting[step]
        if weights is None:
            weights = self._waiting[step] = self._exchange.take(step)
        return weights

    @contextmanager
    def in_use(self, block: int) -> Iterator[None]:
        """Put the copies that a block's head borrows in the place of the model's own weights."""
        for table, leaf, name in self._places[block]:
            learning = self.learning[block].get(name)
            table[leaf] = self._copies[name] if learning is None else learning
        try:
            yield
        finally:
            for table, leaf, name in self._places[block]:
                table[leaf] = self.live[name]

    def state(self) -> dict[str, Tensor]:
        """Return the copies, and those that wait to be used, by names that say which they are."""
        tensors = {f"copy/{name}": copy.contiguous() for name, copy in self._kept().items()}
        for step in self._waiting:
            weights = self._waited_for(step)
            tensors |= {f"waiting/{step}/{name}": weight.contiguous() for name, weight in weights.items()}
        return tensors | {"schedule": torch.tensor([self._step, self.every, self.lag])}

    def _kept(self) -> dict[str, Tensor]:
        """Return all copies by names that are theirs alone."""
        kept = {name: copy.detach() for name, copy in self._copies.items()}
        for block, learning in enumerate(self.learning):
            kept |= {f"{block}/{name}": copy.detach() for name, copy in learning.items()}
        return kept

    def save(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `block_local_copies.safetensors` into a folder."""
        save_file(self.state(), Path(save_directory) / self.file_name)

    def load_(self, save_directory: str | os.PathLike[str]) -> None:
        """Read the copies of an earlier run from its checkpoint.

        Raises:
            CopiesMismatchError: If the file is missing, holds other weights, or was made at other steps. Nothing has
                been loaded then.
        """
        path = Path(save_directory) / self.file_name
        if not path.is_file():
            raise CopiesMismatchError(
                f"{save_directory} holds no {COPIES_NAME}: heads of that run borrowed live layers, as they do by "
                "default in one process, or it was saved with save_only_model=True. Blocks in several processes or on "
                "several devices borrow copies: for a run that is to go on there, begin it with "
                "head_copies='trained'. Else resume without head_copies and head_refresh_steps, lag or decay, or "
                "train on from the model weights alone."
            )
        tensors = self._read(path)
        step, *schedule = tensors.pop("schedule").tolist()
        if schedule != [self.every, self.lag]:
            raise CopiesMismatchError(
                f"The copies in {path} were taken with head_refresh_steps={schedule[0]} and "
                f"head_refresh_lag={schedule[1]}, and this run has {self.every} and {self.lag}. Resume with those of "
                "that run, or train on from the model weights alone."
            )
        kept = self._kept()
        saved = self._saved(tensors, kept)
        if (misfit := first_misfit(kept, saved)) is not None:
            raise CopiesMismatchError(
                f"The borrowed weights in {path} do not fit: {misfit}. Resume with the cut, the head_layers, the "
                "head_copies and the trainable parameters of that run."
            )
        self._step = step
        self.fetch()  # nothing may be left on its way
        for name, copy in kept.items():
            copy.copy_(saved[name])
        self._wait_again(tensors)

    def _saved(self, tensors: Mapping[str, Tensor], kept: Collection[str]) -> dict[str, Tensor]:
        """Return the copies of a file, each under every name that it has here; under its own, where it has none."""
        saved = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "copy":
                here = [mine for mine in self._keys_of(name) if mine in kept]
                saved |= dict.fromkeys(here or [name], tensor)
        return saved

    def _wait_again(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what had set out in the run of a file, and had not come into use."""
        self._waiting.clear()
        devices = {key: copy.device for key, copy in self._all()}
        for key, tensor in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "waiting":
                used_at, _, name = rest.partition("/")
                waiting = self._waiting.setdefault(int(used_at), {})
                waiting |= {mine: tensor.to(devices[mine]) for mine in self._keys_of(name)}

    def _read(self, path: Path) -> dict[str, Tensor]:
        """Read a file of copies; of all blocks' only what concerns the one that is here."""
        kept = self._kept()

        def is_wanted(key: str) -> bool:
            kind, _, rest = key.partition("/")
            if self._exchange is None or kind == "schedule":
                return True
            return rest in kept if kind == "copy" else bool(self._keys_of(rest.partition("/")[2]))

        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if is_wanted(key)}  # noqa: SIM118

    def _keys_of(self, name: str) -> list[str]:
        """Return under which keys a weight is copied here."""
        return [name] if any(key == name for key, _ in self._all()) else []


def check_no_copies_are_left_out(save_directory: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint whose heads have trained copies, for a run whose heads train none.

    Raises:
        CopiesMismatchError: If it holds any.
    """
    path = Path(save_directory) / COPIES_NAME
    if not path.is_file():
        return
    with safe_open(path, framework="pt") as file:
        trained = any(re.match(r"copy/\d+/", key) for key in file.keys())  # noqa: SIM118
    if trained:
        raise CopiesMismatchError(
            f"The heads of {save_directory} have trained copies of the layers above them, and this run has none. "
            "Resume with head_copies='trained', or train on from the model weights alone."
        )


def _stand_in(tensor: Tensor) -> Tensor:
    return nn.Parameter(tensor.detach(), requires_grad=False) if isinstance(tensor, nn.Parameter) else tensor.detach()
