"""Keep each block of a model on its device, and bring to every layer what it is given, while the model runs as it is.

Stands in for accelerate's hooks of a device map. Hidden states go from a device to the next. Side inputs, such as
masks and rotary embeddings, take the same way, once per device and forward pass: each device has them from the one
before, because a copy straight from the first device would make that wait for the one it goes to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_blocklocal.anatomy.modes import evaluation_mode
from hf_blocklocal.anatomy.signals import given_hidden, map_tensors
from hf_blocklocal.crossing import sent, turn_to
from hf_blocklocal.cut.blocks import Cut
from hf_blocklocal.devices.shadows import Shadows, pairs_of


LABELS = ("labels", "shift_labels", "start_positions", "end_positions", "num_items_in_batch")
"""Inputs that the model's own loss looks at, where the last block ends."""


def block_order(model: nn.Module, cut: Cut, inputs: Mapping[str, Any]) -> dict[nn.Module, set[int]]:
    """Find out with which blocks the parts outside the layers run.

    Args:
        model: The model.
        cut: Where it is cut.
        inputs: A small batch with labels, on the model's device.

    Returns:
        For each module outside the layers that runs, the blocks that run at the same time: what runs between two
        blocks runs with the upper one.
    """
    runs: dict[nn.Module, set[int]] = {}
    current = 0

    def note(part: nn.Module, _args: tuple[Any, ...]) -> None:
        runs.setdefault(part, set()).add(current)

    def next_block(*_: Any) -> None:
        nonlocal current
        current += 1

    outside = [module for path, module in model.named_modules() if cut.layer_of_path(path) is None]
    ends = [model.get_submodule(cut.layers[span.last]) for span in cut.spans[:-1]]
    handles = [module.register_forward_pre_hook(note) for module in outside]
    handles += [layer.register_forward_hook(next_block) for layer in ends]
    try:
        with torch.no_grad(), evaluation_mode(model):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return runs


class Hosting:
    """The hooks that let a model run over several devices, attached until they are taken off.

    Args:
        model: The model, its weights in place.
        cut: Where it is cut.
        devices: The device of each block.
        replicas: For modules that hold a tensor which lies elsewhere: by device, tensors to stand in for it.
    """

    def __init__(
        self,
        model: nn.Module,
        cut: Cut,
        devices: Sequence[torch.device],
        replicas: Mapping[nn.Module, Mapping[torch.device, Mapping[str, Tensor]]],
    ) -> None:
        self._devices = tuple(devices)
        self._replicas = replicas
        self._trunks: list[nn.Module] = []
        self._own = {module: _tensors_of(module) for module in replicas}
        self._block = 0
        self._sides = _Sides()
        self._in_memory: list[tuple[Tensor, Tensor]] = []
        self._shadows: Shadows | None = None
        self._is_running = False
        self._came_from: torch.device | None = None
        self._outside = ExitStack()
        self._handles: list[RemovableHandle] = []
        self._attach(model, cut)

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def placed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a model's inputs where they are needed first: labels with the last block, all else with the first."""
        places = {name: self._devices[-1 if name in LABELS else 0] for name in inputs}
        placed = {name: _on(places[name], value) for name, value in inputs.items()}
        here = {id(value) for value in placed.values()}
        self._in_memory = [pair for pair in self._in_memory if id(pair[0]) in here]
        self._in_memory += pairs_of(placed, inputs)
        return placed

    def _attach(self, model: nn.Module, cut: Cut) -> None:
        # Hooks are methods and not closures, so that a copy of a model has hooks of its own.
        keep = self._handles.append
        keep(model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
        keep(model.register_forward_hook(self._leave_model, always_call=True))
        for index, path in enumerate(cut.layers):
            spot, layer = _spot_of(index, cut), model.get_submodule(path)
            keep(layer.register_forward_pre_hook(partial(self._enter_layer, spot), with_kwargs=True))
            if spot.ends_block or spot.ends_stack:
                keep(layer.register_forward_hook(partial(self._leave_layer, spot)))
        for path, part in model.named_modules():
            # What holds the first layer is the model itself, or its trunk: that begins with its inputs in place.
            holds_first = not path or f"{cut.layers[0]}.".startswith(f"{path}.")
            if holds_first and part in self._replicas:
                self._trunks.append(part)
            elif cut.layer_of_path(path) is None and not holds_first:
                keep(part.register_forward_pre_hook(self._enter_part, with_kwargs=True))
        for module in self._replicas:
            keep(module.register_forward_pre_hook(self._take_replicas))
            keep(module.register_forward_hook(self._give_back, always_call=True))

    # ---- Hooks ----

    def _enter_model(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        self._block, self._is_running = 0, True
        self._sides.clear()
        self._outside.close()  # of a pass that has failed
        self._came_from = turn_to(self._devices[0])
        args, kwargs = _on(self._devices[0], args), self.placed(kwargs)
        self._shadows = Shadows(self._in_memory) if self._in_memory else None
        self._shadow()
        return args, kwargs

    def _shadow(self) -> None:
        """Answer from main memory, until a layer begins, what the model asks of its inputs and what it makes of them.

        What it has made before its first layer may be for a later one, as the inputs of a decoder are.
        """
        if self._shadows is not None:
            self._outside.enter_context(self._shadows)

    def _leave_model(self, *_: Any) -> None:
        self._is_running = False
        self._sides.clear()
        self._outside.close()
        self._shadows = None
        if self._came_from is not None:
            turn_to(self._came_from)

    def _enter_layer(
        self, spot: _Spot, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        device = self._devices[spot.block]
        self._block = spot.block
        turn_to(device)
        self._outside.close()  # layers look at no inputs, and are quicker without
        if spot.begins_block:
            self._sides.carry(spot.stack, device)
        hidden = given_hidden(args, kwargs)

        def bring(tensor: Tensor) -> Tensor:
            # A hidden state goes on once; to keep it would be to keep it until the forward pass ends.
            return sent(tensor, device) if tensor is hidden else self._sides.on(device, tensor, spot.stack)

        return map_tensors(args, bring), _all_but_labels(kwargs, bring)

    def _leave_layer(self, spot: _Spot, *_: Any) -> None:
        """Go on with the next block, or with what lies outside the layers."""
        self._block = min(spot.block + spot.ends_block, len(self._devices) - 1)
        if not spot.ends_stack or not self._is_running:  # or a checkpointed layer is being recomputed
            return
        self._shadow()
        for trunk in self._trunks if spot.is_last else ():
            _set_tensors(trunk, self._replicas[trunk].get(self._devices[-1], {}))

    def _enter_part(self, _part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        device = self._devices[self._block]
        turn_to(device)
        return _on(device, args), _all_but_labels(kwargs, lambda tensor: sent(tensor, device))

    def _take_replicas(self, module: nn.Module, _args: tuple[Any, ...]) -> None:
        _set_tensors(module, self._replicas[module].get(self._devices[self._block], {}))

    def _give_back(self, module: nn.Module, *_: Any) -> None:
        _set_tensors(module, self._own[module])


@dataclass(frozen=True)
class _Spot:
    """Where a layer stands."""

    block: int
    stack: int
    begins_block: bool
    ends_block: bool
    ends_stack: bool
    is_last: bool


def _spot_of(layer: int, cut: Cut) -> _Spot:
    block, is_last = cut.block_of_layer(layer), layer + 1 == len(cut.layers)
    return _Spot(
        block,
        cut.stacks[layer],
        begins_block=layer == cut.spans[block].start,
        ends_block=layer == cut.spans[block].last,
        ends_stack=is_last or cut.stacks[layer] != cut.stacks[layer + 1],
        is_last=is_last,
    )


class _Sides:
    """The side inputs of a forward pass, with their copies on the devices that they have come to."""

    def __init__(self) -> None:
        # Each is kept with its copies, so that no other tensor can get its id.
        self._known: dict[int, tuple[Tensor, int, dict[torch.device, Tensor]]] = {}

    def on(self, device: torch.device, tensor: Tensor, stack: int) -> Tensor:
        """Return a side input of a stack of layers on a device."""
        if tensor.device == device and tensor.requires_grad:  # the block's own, with its graph
            return tensor
        _, _, copies = self._known.setdefault(id(tensor), (tensor, stack, {tensor.device: tensor}))
        if device not in copies:
            *_, nearest = copies.values()  # blocks run in the order of devices
            copies[device] = sent(nearest, device)
        return copies[device]

    def carry(self, stack: int, device: torch.device) -> None:
        """Take all side inputs of a stack to the device of its next block, which may need them, or hand them on."""
        for tensor, known_of, _ in list(self._known.values()):
            if known_of == stack and not tensor.requires_grad:  # else the block that has made it keeps it
                self.on(device, tensor, stack)

    def clear(self) -> None:
        """Forget them, for another forward pass."""
        self._known.clear()


def _all_but_labels(kwargs: Mapping[str, Any], bring: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Bring keyword arguments to where a layer needs them; what models hand through for the loss alone stays."""
    return {name: value if name in LABELS else map_tensors(value, bring) for name, value in kwargs.items()}


def _on(device: torch.device, value: Any) -> Any:
    return map_tensors(value, lambda tensor: sent(tensor, device))


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that a module holds itself."""
    held = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def _set_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        (module._parameters if name in module._parameters else module._buffers)[name] = tensor
