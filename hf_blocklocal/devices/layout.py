"""Decide which block lies on which device: after the device map of a model, or over all accelerators there are.

Reads models and moves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_blocklocal.anatomy.layers import find_stacks
from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.cut.partition import boundaries_within_runs
from hf_blocklocal.errors import UnsupportedSettingError


@dataclass(frozen=True)
class Layout:
    """Where blocks are to lie.

    Attributes:
        config: How to cut and teach the model, such that no block lies on two devices.
        devices: The device of each block, in forward order.
    """

    config: BlockLocalConfig
    devices: tuple[torch.device, ...]


def accelerators() -> list[torch.device]:
    """Return the accelerators that this process can see."""
    kind, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    return [] if kind is None else [torch.device(kind.type, index) for index in range(count)]


def find_layout(model: nn.Module, config: BlockLocalConfig, *, processes: int) -> Layout | None:
    """Decide where the blocks of a model are to lie, if that is on several devices of one process.

    Args:
        model: The model, perhaps loaded with a device map.
        config: How to cut and teach it.
        processes: Processes that train it.

    Returns:
        The layout; None where all blocks of this process lie on one device.

    Raises:
        UnsupportedSettingError: If cut, devices and processes do not go together.
        CutError: If there are not enough layers.
    """
    device_map = _device_map(model)
    is_mapped = len(set(device_map.values())) > 1
    if config.num_blocks == 1 or (config.placement == "auto" and not is_mapped):
        return None
    what = "The device map of the model" if is_mapped else "placement='devices'"
    if processes > 1 or config.block_parallel_size > 1:
        raise UnsupportedSettingError(
            f"{what} spreads it over several devices of one process, and there are {processes} processes, with "
            f"block_parallel_size={config.block_parallel_size}. Start one process, or load the model without "
            "device_map and with placement='auto': then block_parallel_size gives every block a process."
        )
    if getattr(model, "quantization_method", None) is not None:
        raise UnsupportedSettingError(
            f"{what} spreads it over several devices, and its weights are quantised, which is not supported together. "
            "Load it without quantization_config, or on one device."
        )
    layers = [path for stack in find_stacks(model, config.layers) for path in stack.layers]
    return _mapped(config, layers, device_map) if is_mapped else _spread(config, len(layers), accelerators())


def _spread(config: BlockLocalConfig, num_layers: int, devices: Sequence[torch.device]) -> Layout:
    """Spread blocks over the devices that there are."""
    if len(devices) < 2:
        raise UnsupportedSettingError(
            f"placement='devices' spreads a model over the accelerators of one process, and there are {len(devices)}. "
            "Use placement='auto' for one device; on several CPUs or machines, block_parallel_size with accelerate "
            "launch gives every block a process."
        )
    num_blocks = min(len(devices), num_layers) if config.leaves_cut_open else config.num_blocks
    used = min(num_blocks, len(devices))
    placed = tuple(devices[block * used // num_blocks] for block in range(num_blocks))
    return Layout(replace(config, num_blocks=num_blocks), placed)


def _mapped(config: BlockLocalConfig, layers: Sequence[str], device_map: Mapping[str, torch.device | str]) -> Layout:
    """Follow a device map."""
    _check_not_offloaded(device_map)
    if config.balance == "cost":
        raise UnsupportedSettingError(
            "balance='cost' and a device map over several devices exclude each other: the map says where layers lie, "
            "and blocks are cut there. Leave balance out, or load the model without device_map and use "
            "placement='devices'."
        )
    of_layer = [_device_of(path, device_map) for path in layers]
    changes = [layer for layer in range(1, len(layers)) if of_layer[layer] != of_layer[layer - 1]]
    edges = [0, *changes, len(layers)]
    order = [of_layer[edge] for edge in edges[:-1]]
    told = ", ".join(f"{of_layer[a]}: {a}-{b - 1}" for a, b in zip(edges, edges[1:], strict=False))
    if len(set(order)) < len(order):
        raise UnsupportedSettingError(
            f"The device map goes back to a device that it has left (layers by device: {told}), so that blocks would "
            "wait for each other. Load the model with device_map='balanced', or a map of one stretch per device."
        )
    if config.boundaries is None:
        if not config.leaves_cut_open and config.num_blocks < len(order):
            raise UnsupportedSettingError(
                f"num_blocks={config.num_blocks} is fewer than the {len(order)} devices that the layers lie on "
                f"({told}), and no block can lie on two. Use num_blocks={len(order)} or more, or leave it out."
            )
        num_blocks = len(order) if config.leaves_cut_open else config.num_blocks
        lengths = [b - a for a, b in zip(edges, edges[1:], strict=False)]
        config = replace(config, num_blocks=num_blocks, boundaries=boundaries_within_runs(lengths, num_blocks))
    elif missing := sorted(set(changes) - set(config.boundaries)):
        raise UnsupportedSettingError(
            f"boundaries={list(config.boundaries)} leave out {missing}, where the device of the layers changes "
            f"({told}), and no block can lie on two devices. Add them, or leave boundaries out."
        )
    starts = [start for start in (0, *config.boundaries) if start < len(layers)]
    return Layout(replace(config, placement="devices"), tuple(of_layer[start] for start in starts))


def _check_not_offloaded(device_map: Mapping[str, torch.device | str]) -> None:
    offloaded = sorted(name for name, device in device_map.items() if str(device) in ("cpu", "disk"))
    kinds = {str(device) for device in device_map.values()}
    if "disk" in kinds or ("cpu" in kinds and kinds - {"cpu", "meta"}):
        raise UnsupportedSettingError(
            f"The device map keeps {', '.join(offloaded[:4])} in main memory or on disk, from where they would be "
            "fetched for every step. Give the devices more memory (max_memory), use a smaller model, or "
            "block_parallel_size on more machines."
        )


def _device_map(model: nn.Module) -> dict[str, torch.device | str]:
    """Return a model's device map, by names in this very model, which adapters may have wrapped."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    given: Mapping[str, Any] = getattr(base, "hf_device_map", None) or {}
    outside = next(name for name, module in model.named_modules() if module is base)
    return {".".join(part for part in (outside, name) if part): _device(place) for name, place in given.items()}


def _device(place: Any) -> torch.device | str:
    if isinstance(place, int):
        kind = torch.accelerator.current_accelerator()
        return torch.device("cuda" if kind is None else kind.type, place)
    device = place if place == "disk" else torch.device(place)
    is_whole_kind = isinstance(device, torch.device) and device.index is None and device.type not in ("cpu", "meta")
    return torch.device(device.type, 0) if is_whole_kind else device


def _device_of(layer: str, device_map: Mapping[str, torch.device | str]) -> torch.device:
    """Return the device that a layer as a whole lies on."""
    inside = {device for name, device in device_map.items() if name.startswith(f"{layer}.")}
    around = [name for name in device_map if name in ("", layer) or layer.startswith(f"{name}.")]
    if around:
        inside.add(device_map[max(around, key=len)])
    if len(inside) != 1:
        raise UnsupportedSettingError(
            f"The device map puts {layer} on {', '.join(sorted(map(str, inside))) or 'no device'}: a layer has to lie "
            "on one. Map layers as a whole, as device_map='balanced' does."
        )
    return inside.pop()
