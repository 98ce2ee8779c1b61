"""The optimizer of one block, as a part of the optimizer that one process would have for all of them.

Groups stay as they are, in number and order, and hold only the parameters that are here. So schedules do not notice,
and what is saved is what one process would save: a checkpoint does not tell how it was made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_blocklocal.errors import UnsupportedSettingError
from hf_blocklocal.parallel.sharding import part_like, whole_like


# Those that treat every number of a parameter by itself.
_ELEMENTWISE = tuple(
    getattr(torch.optim, name)
    for name in ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
)


class OptimizerShard:
    """Makes an optimizer of all parameters one of those that are here, and translates its state.

    Args:
        optimizer: An optimizer without state, changed in place.
        names: The name of every parameter.
        is_here: Whether a parameter is.
        parts: For each parameter that is spread over several processes, the part that is here, whose state is what
            the optimizer keeps.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: Mapping[nn.Parameter, str],
        is_here: Callable[[nn.Parameter], bool],
        parts: Mapping[nn.Parameter, nn.Parameter] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self._names: list[list[str]] = []
        self._here: list[str] = []
        self._spread = {names[whole]: whole for whole in parts or {}}
        for group in optimizer.param_groups:
            self._names.append([names[parameter] for parameter in group["params"]])
            group["params"] = [parameter for parameter in group["params"] if is_here(parameter)]
            self._here += [names[parameter] for parameter in group["params"]]
        optimizer.register_load_state_dict_pre_hook(lambda _optimizer, state: self.localised(state))

    def state_by_name(self) -> dict[str, dict[str, Any]]:
        """Return what the optimizer keeps of every parameter that is here."""
        state = self.optimizer.state_dict()["state"]
        return {name: self._whole(name, state[index]) for index, name in enumerate(self._here) if index in state}

    def whole(self, state_by_name: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return the state dict of an optimizer of all parameters.

        Args:
            state_by_name: What is kept of every parameter, wherever it is.
        """
        groups, state, start = [], {}, 0
        for group, names in zip(self.optimizer.state_dict()["param_groups"], self._names, strict=True):
            groups.append({**group, "params": list(range(start, start + len(names)))})
            state |= {start + place: state_by_name[name] for place, name in enumerate(names) if name in state_by_name}
            start += len(names)
        return {"state": state, "param_groups": groups}

    def localised(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the part of a state dict of all parameters that is for those that are here.

        A state dict that is of those alone is returned as it is.
        """
        sizes = [len(group["params"]) for group in state_dict["param_groups"]]
        if sizes != [len(names) for names in self._names]:
            return state_dict
        here, start = set(self._here), 0
        groups, state = [], {}
        for group, names in zip(state_dict["param_groups"], self._names, strict=True):
            mine = []
            for index, name in zip(group["params"], names, strict=True):
                if name in here:
                    if index in state_dict["state"]:
                        state[start + len(mine)] = self._part(name, state_dict["state"][index])
                    mine.append(start + len(mine))
            start += len(mine)
            groups.append({**group, "params": mine})
        return {"state": state, "param_groups": groups}

    def _whole(self, name: str, kept: dict[str, Any]) -> dict[str, Any]:
        """Return what is kept of a parameter as if it were whole; it is brought together when it is looked at."""
        if name not in self._spread:
            return kept
        whole = self._spread[name]
        part = whole.detach().to_local()
        return {key: whole_like(whole, value) if _is_like(value, part) else value for key, value in kept.items()}

    def _part(self, name: str, kept: dict[str, Any]) -> dict[str, Any]:
        """Return the part that is here of what is kept of a whole parameter."""
        if name not in self._spread:
            return kept
        whole = self._spread[name]
        return {key: part_like(whole, value) if _is_like(value, whole) else value for key, value in kept.items()}


def check_is_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Refuse, for parts of parameters, an optimizer that looks at more of a parameter than one number at a time.

    Raises:
        UnsupportedSettingError: If it may.
    """
    if type(optimizer) not in _ELEMENTWISE:
        known = ", ".join(kind.__name__ for kind in _ELEMENTWISE)
        raise UnsupportedSettingError(
            f"shard_replicas=True gives an optimizer parts of weights, and {type(optimizer).__name__} may need them "
            f"whole. Choose one of torch's own that do not: {known}; or leave shard_replicas out."
        )


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape


def tensors_in(state_by_name: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the tensors of an optimizer's state under flat names."""
    return {
        f"{name}/{key}": value
        for name, state in state_by_name.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def plain_values_in(state_by_name: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what in an optimizer's state is no tensor."""
    return {
        name: {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        for name, state in state_by_name.items()
    }


def state_of(tensors: Mapping[str, Tensor], plain: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the state by name that the two functions above have taken apart."""
    state = {name: dict(values) for name, values in plain.items()}
    for flat, tensor in tensors.items():
        name, key = flat.rsplit("/", 1)
        state[name][key] = tensor
    return state
