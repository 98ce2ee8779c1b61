"""Turn an assembled model on one device into the same on several: blocks, their heads, and what these need there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_blocklocal.anatomy.embeddings import target_embedding
from hf_blocklocal.anatomy.modes import evaluation_mode
from hf_blocklocal.assembly import Assembly
from hf_blocklocal.crossing import sent
from hf_blocklocal.devices.copying import CopiesOnDevices, Place, Pool
from hf_blocklocal.devices.hosting import Hosting, block_order
from hf_blocklocal.devices.twins import Twins, make_twin
from hf_blocklocal.errors import UnsupportedSettingError
from hf_blocklocal.parallel.uses import check_heads_look_up, used_by_heads
from hf_blocklocal.targets.batch import Targets


# Where a model keeps the hooks that it carries.
_HOSTING = "_block_local_hosting"


def gather_(model: nn.Module) -> None:
    """Bring a model together in main memory, without the hooks of an earlier spread."""
    if (before := vars(model).pop(_HOSTING, None)) is not None:
        before.detach()
    _move_(model, torch.device("cpu"))


class Spread:
    """An assembly on several devices.

    Attributes:
        assembly: The assembly, to be used in place of the one that was given.
        devices: The device of each block.

    Args:
        assembly: The model with its heads, on one device, usually the CPU. Its parameters are moved, its step changed.
        devices: The device of each block.
        inputs: A small batch with labels, where the model is.

    Raises:
        UnsupportedSettingError: If something outside the layers cannot be told to one device.
    """

    def __init__(self, assembly: Assembly, devices: Sequence[torch.device], inputs: Mapping[str, Any]) -> None:
        self.devices = tuple(devices)
        self._model, cut, step = assembly.module.model, assembly.cut, assembly.step
        self._pool = Pool(self._model)
        outside = _Outside(assembly, self.devices, inputs)
        replicas = outside.replicas(self._pool)
        lent, twins = set(), []
        if step.shortcut is not None:
            used_by_block = used_by_heads(assembly, inputs)
            check_heads_look_up(assembly, used_by_block)
            for block, used in enumerate(used_by_block):
                own = outside.own(block)
                twins.append(make_twin(assembly, block, self.devices[block], self._pool, used=used, own=own))
                lent |= twins[-1].lent
        lent |= self._lend_embeddings(assembly)
        outside.move_()
        for block, head in enumerate(assembly.heads):
            head.to(self.devices[block])
        for index, path in enumerate(cut.layers):
            _move_(self._model.get_submodule(path), self.devices[cut.block_of_layer(index)])
        copies = assembly.copies
        if copies is not None:
            copies = CopiesOnDevices(self._pool, lent, copies, self.devices)
        self.assembly = replace(assembly, copies=copies)
        if step.shortcut is not None:
            step.shortcut = Twins(step.shortcut, twins, self.devices)
        step.devices = tuple(dict.fromkeys(self.devices))
        step.bring = self._bring
        self._hosting = Hosting(self._model, cut, self.devices, replicas)
        vars(self._model)[_HOSTING] = self._hosting
        self._check_runs(inputs)
        self._tell_others()

    def placed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a model's inputs on the devices where they are needed first."""
        return self._hosting.placed(inputs)

    def renew_(self) -> None:
        """Copy anew what is copied once, after weights have been loaded."""
        self._pool.renew_frozen_()

    def detach(self) -> None:
        """Take the hooks off the model, whose parts stay where they are."""
        self._hosting.detach()

    def _tell_others(self) -> None:
        """Say where layers are, in the way of accelerate's device maps, to all who would move the model."""
        model, cut = self._model, self.assembly.cut
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        names = {module: name for name, module in base.named_modules()}
        base.hf_device_map = {"": self.devices[0]} | {
            names[model.get_submodule(path)]: self.devices[cut.block_of_layer(index)]
            for index, path in enumerate(cut.layers)
        }

    def _lend_embeddings(self, assembly: Assembly) -> set[Place]:
        """Copy the embedding of the targets to where heads of their own compare with it."""
        self._embeddings: dict[int, Tensor] = {}
        if assembly.step.shortcut is not None:  # heads that borrow have the model's own
            return set()
        names = {parameter: name for name, parameter in self._model.named_parameters()}
        places = set()
        for block, lent in enumerate(assembly.lent):
            name = names[target_embedding(self._model)] if lent and assembly.task.target == "vocabulary" else None
            if name in lent:
                self._embeddings[block] = self._pool.copy(name, self.devices[block])
                places.add((self.devices[block], name))
        return places

    def _bring(self, block: int, targets: Targets) -> Targets:
        """Return targets on the device of a block."""
        device = self.devices[block]
        candidates = targets.candidates
        if candidates is not None:
            ids_C = None if candidates.ids_C is None else sent(candidates.ids_C, device)
            embeddings_CE = candidates.embeddings_CE
            if block in self._embeddings:
                embedding_VE = self._embeddings[block].detach()
                embeddings_CE = embedding_VE if ids_C is None else embedding_VE[ids_C]
            candidates = replace(
                candidates,
                embeddings_CE=embeddings_CE,
                log_weights_C=sent(candidates.log_weights_C, device),
                ids_C=ids_C,
            )
        held = {field.name: getattr(targets, field.name) for field in fields(targets)}
        here = {name: sent(value, device) for name, value in held.items() if isinstance(value, Tensor)}
        return replace(targets, **here, candidates=candidates)

    @torch.no_grad()
    def _check_runs(self, inputs: Mapping[str, Any]) -> None:
        try:
            with evaluation_mode(self._model):
                self._model(**inputs)
        except RuntimeError as error:
            self.detach()
            if "same device" not in str(error):
                raise
            raise UnsupportedSettingError(
                f"{type(self._model).__name__} cannot be spread over several devices: outside its layers, it brings "
                f"tensors of different blocks together ({error}). Train it with a process per block "
                "(block_parallel_size), or on one device."
            ) from error


class _Outside:
    """What lies outside the layers of a model, and with which blocks it runs."""

    def __init__(self, assembly: Assembly, devices: Sequence[torch.device], inputs: Mapping[str, Any]) -> None:
        self._assembly, self._devices = assembly, devices
        model, cut = assembly.module.model, assembly.cut
        self._needs = assembly.needs.parameters
        order = block_order(model, cut, inputs)
        self._trunks = [path for path, _ in model.named_modules() if not path or cut.layers[0].startswith(f"{path}.")]
        self._modules = {path: module for path, module in model.named_modules() if cut.layer_of_path(path) is None}
        # A trunk begins with the first block and ends with the last, so it does not say when its own tensors are used.
        ran = {path: order[module] for path, module in self._modules.items() if module in order}
        self._runs = {path: blocks for path, blocks in ran.items() if path not in self._trunks}
        self._homes = self._find_homes()

    def _find_homes(self) -> dict[nn.Parameter, int]:
        """Return the block that each parameter lies with: its own, or the first that uses it, if nobody trains it."""
        homes: dict[nn.Parameter, int] = {}
        for path, name, parameter in self._parameters():
            if parameter.requires_grad:
                homes[parameter] = self._assembly.owners[self._names[parameter]]
                self._check_runs_at_home(path, name, homes[parameter])
            else:
                first = min(self._users(path, parameter))
                homes[parameter] = min(first, homes.get(parameter, first))
        return homes

    @property
    def _names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self._assembly.module.model.named_parameters()}

    def _parameters(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        for path, module in self._modules.items():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield path, name, parameter

    def _users(self, path: str, parameter: nn.Parameter) -> set[int]:
        """Return the blocks that use a parameter in a module."""
        name = self._names[parameter]
        return self._runs.get(path) or {block for block, names in enumerate(self._needs) if name in names} or {0}

    def _check_runs_at_home(self, path: str, name: str, home: int) -> None:
        elsewhere = [block for block in self._runs.get(path, ()) if self._devices[block] != self._devices[home]]
        if elsewhere:
            raise UnsupportedSettingError(
                f"{path}.{name} runs with block {elsewhere[0]}, on {self._devices[elsewhere[0]]}, and learns from "
                f"block {home}, on {self._devices[home]}: its gradient would have to travel. Freeze it, use other "
                "boundaries, or train on one device."
            )

    def own(self, block: int) -> set[str]:
        """Return the names of the parameters that a block uses and that lie on its device."""
        model, cut = self._assembly.module.model, self._assembly.cut
        return {
            name
            for name, parameter in model.named_parameters()
            if name in self._needs[block]
            and (cut.layer_of_path(name) is not None or self._devices[self._homes[parameter]] == self._devices[block])
        }

    def replicas(self, pool: Pool) -> dict[nn.Module, dict[torch.device, dict[str, Tensor]]]:
        """Copy frozen weights, and buffers, to all devices where modules that hold them run."""
        made: dict[nn.Module, dict[torch.device, dict[str, Tensor]]] = {}
        for path, blocks in self._runs.items():
            module, by_device = self._modules[path], defaultdict(dict)
            for device in dict.fromkeys(self._devices[block] for block in sorted(blocks)):
                for name, parameter in module._parameters.items():
                    if parameter is not None and self._devices[self._homes[parameter]] != device:
                        by_device[device][name] = pool.copy(self._names[parameter], device)
                for name, buffer in module._buffers.items():
                    if buffer is not None and self._devices[min(blocks)] != device:
                        by_device[device][name] = buffer.to(device, copy=True)
            if by_device:
                made[module] = dict(by_device)
        last = self._devices[-1]
        for path in self._trunks:  # behind the last layer, a trunk is where that is
            buffers = {name: buffer for name, buffer in self._modules[path]._buffers.items() if buffer is not None}
            if buffers and last != self._devices[0]:
                made[self._modules[path]] = {last: {name: item.to(last, copy=True) for name, item in buffers.items()}}
        return made

    def move_(self) -> None:
        """Move all of it to the devices where it runs."""
        for parameter, home in self._homes.items():
            parameter.data = parameter.data.to(self._devices[home])
        for path, module in self._modules.items():
            home = min(self._runs.get(path, {0}))
            for buffer in module._buffers.values():
                if buffer is not None:
                    buffer.data = buffer.data.to(self._devices[home])


def _move_(module: nn.Module, device: torch.device) -> None:
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = tensor.data.to(device)
