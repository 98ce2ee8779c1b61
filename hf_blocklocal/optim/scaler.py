"""Loss scaling for fp16, block by block: a gradient that overflows in one block leaves the others alone.

Small gradients vanish in fp16, so a loss is multiplied with a scale before its backward pass, and the gradients are
divided by it after. Where they overflow, the step is left out and the scale is lowered. Here each block does so by
itself, with a `torch.amp.GradScaler` of its own, so that a block is trained the same wherever the others live. Where
losses reach into other blocks, all scale alike, and still each block leaves out its own steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from hf_blocklocal.errors import UnsupportedSettingError
from hf_blocklocal.optim.stepping import step_block_


class BlockScaler:
    """Has the methods of a `GradScaler` that accelerate and Trainer call, and a scaler inside for every block here.

    The optimizer is stepped whatever a block does, so that its schedule goes on alike wherever the blocks are.

    Attributes:
        overflows: How many steps each block has left out, on its device.

    Args:
        given: What would scale the loss of a single block; it tells how.
        at_work: Returns the block whose loss is being sent back.
        waits: Whether the host may wait for a device to know whether a gradient has overflowed. If not, it is left to
            the optimizer, which must be a fused one.
        add_up: Returns the sum of a tensor over the processes that have other parts of these blocks, if there are any.
    """

    def __init__(
        self,
        given: Any,
        *,
        at_work: Callable[[], int],
        waits: bool = True,
        add_up: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._given, self._at_work, self._add_up = given, at_work, add_up
        self.waits, self._coupled = waits, False
        self._blocks: Mapping[int, Sequence[nn.Parameter]] = {}
        self._scalers: dict[int, Any] = {}
        self._looks: dict[int, _Look] = {}
        self.overflows: dict[int, Tensor] = {}

    def begin_(self, blocks: Mapping[int, Sequence[nn.Parameter]], *, coupled: bool = False) -> None:
        """Begin a run, with the scales that the last one has come to, if there was one.

        Args:
            blocks: The parameters of the blocks that are here.
            coupled: Whether losses reach into other blocks, so that one scale must do for all.
        """
        state = self.state_dict() if self._scalers else None
        shared = deepcopy(self._given)
        self._scalers = {block: shared if coupled else deepcopy(self._given) for block in blocks}
        self._blocks, self._coupled = blocks, coupled
        self._looks.clear()
        self.overflows.clear()
        if state is not None:
            self.load_state_dict(state)

    def is_enabled(self) -> bool:
        """Tell whether losses are scaled at all."""
        return self._given.is_enabled()

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss of the block at work, scaled."""
        return self._scalers[self._at_work()].scale(loss)

    def get_scale(self) -> float:
        """Return the smallest scale of the blocks here. Waits for their devices."""
        return self.state_dict()["scale"]

    def unscale_(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Unscale the gradients of all blocks that have not been settled in this step, for whatever optimizer."""
        self.settle_(*self._blocks)

    def settle_(self, *blocks: int) -> None:
        """Unscale the complete gradients of blocks, and drop those of a block that has overflowed.

        Where the host must not wait, they are kept, and `step` leaves them out. A block is settled once in a step.
        """
        new = {block: self._look(block) for block in blocks if block not in self._looks and self._gradients(block)}
        self._looks |= new
        for block, look in new.items():
            self.overflows[block] = look.overflow + self.overflows.get(block, 0)
        if not (self.waits and new):
            return
        device = next(iter(new.values())).overflow.device
        overflown = torch.stack([look.overflow.to(device) for look in new.values()]).tolist()
        for block, is_lost in zip(new, overflown, strict=True):
            if is_lost:
                for parameter in self._blocks[block]:
                    parameter.grad = None

    def _gradients(self, block: int) -> list[Tensor]:
        return [parameter.grad for parameter in self._blocks[block] if parameter.grad is not None]

    def _look(self, block: int) -> _Look:
        """Unscale the gradients of a block, and see whether one has overflowed, here or in another part."""
        scaler, gradients = self._scalers[block], self._gradients(block)
        scaler.scale(gradients[0].new_zeros(()))  # its scale must be there, even if only others had a loss
        look = _Look(scaler, self._blocks[block])
        if self._add_up is None:
            return look
        anywhere = nn.Parameter(torch.zeros_like(look.overflow))
        anywhere.grad = torch.where(self._add_up(look.overflow.clone()) > 0, torch.inf, 0.0)
        return _Look(scaler, [anywhere], before=look)

    @contextmanager
    def left_out_if_lost(self, block: int, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Let an optimizer that steps a block inside the `with` leave it as it is, if its gradients overflow."""
        if self.waits or block not in self._looks:  # dropped, or none
            yield
            return
        optimizer.found_inf = self._looks[block].overflow
        try:
            yield
        finally:
            del optimizer.found_inf

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step the blocks whose gradients are finite. Returns what the optimizer does."""
        self.unscale_()
        if not self.waits:
            for block, parameters in self._blocks.items():
                if self._gradients(block):
                    with self.left_out_if_lost(block, optimizer):
                        step_block_(optimizer, parameters)
        return optimizer.step(*args, **kwargs)

    def update(self) -> None:
        """Lower the scale of blocks that have overflowed, and raise that of blocks that have not for long."""
        for scaler in {id(self._scalers[block]): self._scalers[block] for block in self._looks}.values():
            scaler.update()
        self._looks.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the blocks here, in a form that a scaler of all could load."""
        return state_of_all([{str(block): scaler.state_dict() for block, scaler in self._scalers.items()}])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a run, wherever its blocks were, or of a scaler of all of them."""
        by_block = {} if self._coupled else state.get("blocks", {})
        for block, scaler in self._scalers.items():
            scaler.load_state_dict(by_block.get(str(block), state))


class _Look:
    """A look at the gradients of some parameters, which a `GradScaler` takes for the step of an optimizer.

    Args:
        scaler: It unscales them.
        parameters: The parameters.
        before: An earlier look in the same step. The scaler tells looks apart by where they are in memory.
    """

    # So the scaler tells by `found_inf` what it has found, and nobody waits.
    _step_supports_amp_scaling = True

    def __init__(self, scaler: Any, parameters: Sequence[nn.Parameter], before: _Look | None = None) -> None:
        self.param_groups = [{"params": parameters}]
        self.before = before
        scaler.unscale_(self)
        scaler.step(self)

    def step(self) -> None:
        """Note whether a gradient has overflowed, 0 or 1 on its device."""
        self.overflow = (self.found_inf > 0).float()


def state_of_all(states: Iterable[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Put together the states of blocks by name, with what a scaler of all of them would start from.

    Args:
        states: Those of every process.
    """
    by_block = {block: dict(state) for states_here in states for block, state in states_here.items()}
    lowest = {key: min(state[key] for state in by_block.values()) for key in next(iter(by_block.values()))}
    return {**lowest, "blocks": by_block}


def check_leaves_out(optimizer: torch.optim.Optimizer) -> None:
    """Refuse, where no host may wait, an optimizer that cannot leave out a step by itself.

    Raises:
        UnsupportedSettingError: If it is not fused.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise UnsupportedSettingError(
            f"With fp16 and blocks on several devices, {type(optimizer).__name__} would have to wait at every step "
            "for all devices, to know whether a gradient has overflowed. Use optim='adamw_torch_fused', which leaves "
            "out a step by itself, or bf16, or one device."
        )
