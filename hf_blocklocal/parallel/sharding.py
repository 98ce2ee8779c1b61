"""Spread the layers of a block over the processes that hold it: FSDP2, one layer at a time.

A layer is brought together where it runs, forward or backward, and let go behind it. Its gradients are averaged right
into the parts. What lies outside the layers, and the heads, stays whole in every process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_blocklocal.anatomy.signals import map_tensors
from hf_blocklocal.errors import UnsupportedSettingError
from hf_blocklocal.optim.collectives import broadcast_from_first, sum_over_processes
from hf_blocklocal.parallel.chain import Chain


class ShardedLayers:
    """The layers of one block, of each of whose parameters this process has a part.

    Attributes:
        parts: For each parameter of the layers, what is here of it: a plain one in the same memory, for optimizers
            and for norms.

    Args:
        layers: The layers by name, whole, where they are to compute. Changed in place: they have new parameters.
        chain: The place of this process.

    Raises:
        UnsupportedSettingError: If parameters are in several layers, or of several dtypes in one.
    """

    def __init__(self, layers: Mapping[str, nn.Module], chain: Chain) -> None:
        check_can_be_sharded(layers)
        self._chain, self._layers = chain, list(layers.values())
        self._used: set[nn.Parameter] = set()
        self._listens = True
        mesh = DeviceMesh.from_group(chain.replicas, chain.device.type)
        for layer in layers.values():
            chain.together(broadcast_from_first, layer.parameters(), chain.replicas)
            layer.register_forward_hook(_without_views)
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=_without_dimensions(layer))
            # Experts that only other processes have used; without, all would wait for each other.
            layer.set_reduce_scatter_unused_params(True)
            if dist.get_backend(chain.replicas) == "gloo":  # with others it is the device that waits
                layer.set_custom_all_gather(_Guarded(chain, dist.all_gather_single))
                layer.set_custom_reduce_scatter(_Guarded(chain, dist.reduce_scatter_single))
            layer.register_load_state_dict_pre_hook(_take_parts)
            self._note_uses(layer)
        self.parts: dict[nn.Parameter, nn.Parameter] = {
            whole: nn.Parameter(whole.detach().to_local(), requires_grad=whole.requires_grad)
            for layer in layers.values()
            for whole in layer.parameters()
            if isinstance(whole, DTensor)
        }

    @contextmanager
    def parts_in_place(self) -> Iterator[None]:
        """Let the layers have the parts for their parameters inside the `with`, to make an optimizer of them."""
        tables = [module._parameters for layer in self._layers for module in layer.modules()]
        places = [(table, leaf, p) for table in tables for leaf, p in table.items() if p in self.parts]
        for table, leaf, whole in places:
            table[leaf] = self.parts[whole]
        try:
            yield
        finally:
            for table, leaf, whole in places:
                table[leaf] = whole

    def hand_over_(self) -> None:
        """Put the averaged gradients, so far with the parameters, to their parts. All processes with the block must.

        As where nothing is spread, what no process has used has none.
        """
        used = torch.tensor([float(whole in self._used) for whole in self.parts], device=self._chain.device)
        for (whole, part), uses in zip(self.parts.items(), self.sum(used).tolist(), strict=True):
            part.grad = whole.grad.to_local() if uses > 0 else None
            whole.grad = None
        self._used.clear()

    @contextmanager
    def keeping_company(self) -> Iterator[None]:
        """Run layers inside the `with` for the sake of other processes: what is used here alone gets no gradient."""
        self._listens = False
        try:
            yield
        finally:
            self._listens = True

    def forget_gradients_(self) -> None:
        """Free the gradients of the parts, which the model knows nothing of."""
        for part in self.parts.values():
            part.grad = None

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes that hold the block."""
        return self._chain.together(sum_over_processes, values, self._chain.replicas)

    def _note_uses(self, layer: nn.Module) -> None:
        """Write down which parameters are given a gradient."""
        wholes = dict(layer.named_parameters())

        def listen(layer: nn.Module, args: tuple[Any, ...]) -> None:
            handle.remove()
            for name, parameter in layer.named_parameters():  # now whole, and the same objects every time
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(partial(note, wholes[name]))

        def note(whole: nn.Parameter, _: Tensor) -> None:
            if self._listens:
                self._used.add(whole)

        handle = layer.register_forward_pre_hook(listen)


class _Guarded:
    """A collective of a layer that looks around while it waits; see `Chain.together`."""

    def __init__(self, chain: Chain, collective: Callable[..., Any]) -> None:
        self._chain, self._collective = chain, collective

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for what comes and goes."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False, **options: Any
    ) -> None:
        """Run it, at once whatever is asked for."""
        self._chain.together(self._collective, output_tensor, input_tensor, group=group, **options)


def check_can_be_sharded(layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers that cannot be spread one by one.

    Raises:
        UnsupportedSettingError: If torch is too old, parameters are in several layers, or of several dtypes in one.
    """
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise UnsupportedSettingError(
            f"shard_replicas=True needs torch 2.13 or later, and this is {torch.__version__}. Install a later one, or "
            "leave shard_replicas out."
        )
    times = Counter(parameter for layer in layers.values() for parameter in set(layer.parameters()))
    for path, layer in layers.items():
        for name, parameter in layer.named_parameters():
            if times[parameter] > 1:
                raise UnsupportedSettingError(
                    f"shard_replicas=True brings one layer together at a time, and {path}.{name} is in "
                    f"{times[parameter]} layers. Leave shard_replicas out."
                )
        dtypes = sorted({str(parameter.dtype) for parameter in layer.parameters() if parameter.requires_grad})
        if len(dtypes) > 1:
            raise UnsupportedSettingError(
                f"shard_replicas=True averages the gradients of a layer together, and {path} has trainable parameters "
                f"of {' and '.join(dtypes)}. Load the model in one dtype, or leave shard_replicas out."
            )


def check_not_used_outside(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse weights of layers that other modules use too, for which they would be in parts.

    Raises:
        UnsupportedSettingError: For the first such weight.
    """
    inside = {parameter for layer in layers.values() for parameter in layer.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in inside and not any(name.startswith(f"{path}.") for path in layers):
            raise UnsupportedSettingError(
                f"shard_replicas=True keeps a part of each weight of a layer, and {name} is such a weight that is "
                "used outside of the layers too. Leave shard_replicas out, or untie it: tied_weights='untie'."
            )


def whole_like(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """Return a tensor that has a part in every process, such as an optimizer's, as one like its parameter."""
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def part_like(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """Return, of a tensor like a parameter that all processes have, the part that is this one's."""
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(whole.to(parameter.device), mesh, placements, src_data_rank=None).to_local().clone()


def _take_parts(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a layer load what a file has whole."""
    for name, parameter in layer.named_parameters():
        given = state_dict.get(prefix + name)
        if isinstance(parameter, DTensor) and isinstance(given, Tensor) and not isinstance(given, DTensor):
            state_dict[prefix + name] = whole_like(parameter, part_like(parameter, given))


def _without_views(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Return outputs that may be changed in place, which views of others may not be: FSDP has hooks on them."""
    return map_tensors(output, lambda tensor: tensor.clone() if tensor._is_view() else tensor)


def _without_dimensions(layer: nn.Module) -> set[nn.Parameter]:
    """Return single numbers, of which there are no parts."""
    return {parameter for parameter in layer.parameters() if parameter.dim() == 0}
