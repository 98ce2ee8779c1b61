"""Copies of weights on the devices of blocks that use them and do not own them.

What a head uses of later blocks is as old as `Copies` has it, on every device that uses it. What nobody trains is
copied once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from hf_blocklocal.borrowing.copies import Copies
from hf_blocklocal.crossing import Underway, set_out


Place = tuple[torch.device, str]
"""A device, and the name of a weight that is copied there."""


class Pool:
    """Copies of a model's weights, and of its running statistics, one of each per device.

    Attributes:
        live: Parameters and buffers of the model, by name.
        copies: The copies so far.

    Args:
        model: The model, which keeps its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.live: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers()
        )
        self.copies: dict[Place, Tensor] = {}

    def copy(self, name: str, device: torch.device) -> Tensor:
        """Return the copy of a tensor on a device, made when it is first asked for."""
        if (device, name) not in self.copies:
            live = self.live[name]
            moved = live.detach().to(device, copy=True)
            is_weight = isinstance(live, nn.Parameter)
            self.copies[device, name] = nn.Parameter(moved, requires_grad=False) if is_weight else moved
        return self.copies[device, name]

    @torch.no_grad()
    def renew_frozen_(self) -> None:
        """Copy anew what nobody trains, after weights have been loaded."""
        for (_, name), copy in self.copies.items():
            if not self.live[name].requires_grad:
                copy.copy_(self.live[name])


class CopiesOnDevices(Copies):
    """Copies as `Copies` takes them, each on every device that uses it.

    They set out when they are as old as they are to be, and wait where they are used. Without lag they are fetched
    when they are used, and that device waits for them.

    Args:
        pool: Copies of weights.
        lent: Which of them are of later blocks; frozen ones stay as they are.
        like: The schedule to follow; its copies that learn are on their way with their heads.
        devices: The device of each block.
    """

    def __init__(self, pool: Pool, lent: set[Place], like: Copies, devices: Sequence[torch.device]) -> None:
        super().__init__(nn.Module(), [], every=like.every, lag=like.lag, decay=like.decay)
        self.learning, self._devices = like.learning, devices
        places = sorted((place for place in lent if place[1] in like.live), key=str)
        self._copies = {f"{device}/{name}": pool.copy(name, device) for device, name in places}
        learning = [(devices[block], name) for block, mine in enumerate(like.learning) for name in mine]
        self._places_of = {f"{device}/{name}": (device, name) for device, name in (*places, *learning)}
        self.live = {key: pool.live[name] for key, (_, name) in self._places_of.items()}

    def __getitem__(self, parameter: nn.Parameter) -> Tensor:
        """Return the form of a weight without its values; which copy is meant is known where a block asks."""
        return parameter.detach().to("meta")

    def _set_out(self, used_at: int, *, now: bool) -> None:
        if now:
            super()._set_out(used_at, now=True)
        else:
            self._waiting[used_at] = {
                key: set_out(self.live[key].detach(), device) for key, (device, _) in self._places_of.items()
            }

    def _waited_for(self, step: int) -> dict[str, Tensor]:
        weights = self._waiting[step]
        return {key: item.arrived() if isinstance(item, Underway) else item for key, item in weights.items()}

    def in_use(self, block: int) -> AbstractContextManager[None]:
        """Do nothing: the copies are in place, in models of their own."""
        return nullcontext()

    def state(self) -> dict[str, Tensor]:
        """Return the copies and those that wait, each weight once: on all devices it is the same."""
        state = {}
        for key, tensor in super().state().items():
            kind, _, rest = key.partition("/")
            step, _, rest = rest.partition("/") if kind == "waiting" else ("", "", rest)
            _, name = self._places_of.get(rest, (None, rest))
            state["/".join(part for part in (kind, step, name) if part)] = tensor
        return state

    def _key(self, block: int, name: str) -> str:
        return f"{self._devices[block]}/{name}"

    def _keys_of(self, name: str) -> list[str]:
        return [key for key, (_, known) in self._places_of.items() if known == name]
