"""Pull the weights of a block towards where they started, apart from the gradient, as AdamW decays them to zero.

After every step, `w <- w - lr * strength * (w - w0)`, with the learning rate of that step. The starting weights take
as much memory as those that are pulled; a checkpoint keeps them, so that a resumed run is pulled to the same place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_blocklocal.errors import AnchorMismatchError, UnsupportedSettingError
from hf_blocklocal.fitting import first_misfit


ANCHOR_NAME = "block_local_anchor.safetensors"


class Anchor:
    """The starting weights of some parameters, and the pull back to them.

    Attributes:
        file_name: Where they are kept in a checkpoint.

    Args:
        parameters: The parameters to pull, by name, where they start.
        strength: Factor of the pull beside the learning rate.
        alone: Whether these are the parameters of one block, and those of the others are elsewhere.
        part_of: Returns, of the starting weight of a name, what the parameter here is a part of; by default all.
    """

    file_name = ANCHOR_NAME

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        strength: float,
        *,
        alone: bool = False,
        part_of: Callable[[str, Tensor], Tensor] = lambda name, whole: whole,
    ) -> None:
        self.strength = strength
        self.alone = alone
        self._part_of = part_of
        self._parameters = dict(parameters)
        self._start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._handle: RemovableHandle | None = None

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Pull after every step of an optimizer, and of no other any more.

        Raises:
            UnsupportedSettingError: If the optimizer has no learning rate per group, or keeps other weights than the
                model's.
        """
        groups = optimizer.param_groups
        if callable(getattr(optimizer, "train", None)) or any(group.get("lr") is None for group in groups):
            raise UnsupportedSettingError(
                f"anchor={self.strength} pulls by the learning rate of each parameter group, and "
                f"{type(optimizer).__name__} has none or averages the weights itself. Choose another optimizer (for "
                "Adafactor: relative_step=False and a learning rate), or leave anchor out."
            )
        if self._handle is not None:
            self._handle.remove()
        start = {self._parameters[name]: tensor for name, tensor in self._start.items()}

        @torch.no_grad()
        def pull(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # The groups are those of the step that was just taken, which may be of one block only.
            lost = getattr(optimizer, "found_inf", None)  # the step was left out, if it is not zero
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None and parameter in start:
                        difference = parameter - start[parameter]
                        difference.mul_(float(group["lr"]) * self.strength)
                        parameter.sub_(difference if lost is None else difference * (lost == 0))

        self._handle = optimizer.register_step_post_hook(pull)

    def state(self) -> dict[str, Tensor]:
        """Return the starting weights by name."""
        return {name: tensor.contiguous() for name, tensor in self._start.items()}

    def save(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `block_local_anchor.safetensors` into a folder."""
        save_file(self.state(), Path(save_directory) / self.file_name)

    def load_(self, save_directory: str | os.PathLike[str]) -> None:
        """Read the starting weights of an earlier run from its checkpoint.

        Raises:
            AnchorMismatchError: If the file is missing or belongs to other parameters. Nothing has been loaded then.
        """
        path = Path(save_directory) / self.file_name
        if not path.is_file():
            raise AnchorMismatchError(
                f"{save_directory} holds no {ANCHOR_NAME}: that run had no anchor, or save_only_model=True, so it is "
                "not known where its weights started. Resume with anchor=0, or train on from the model weights alone."
            )
        tensors: dict[str, Tensor] = load_file(path)
        if self.alone:  # the file is of all blocks
            tensors = {name: self._part_of(name, tensor) for name, tensor in tensors.items() if name in self._start}
        if (misfit := first_misfit(self._start, tensors)) is not None:
            raise AnchorMismatchError(
                f"The starting weights in {path} do not fit: {misfit}. Resume with the cut and the trainable "
                "parameters of that run."
            )
        for name, tensor in tensors.items():
            self._start[name].copy_(tensor)
