"""Hold copies of a model's weights that a head trains as its own.

Optimizers and everything else that asks for parameters sees them, by the names that they have in the model. State
dicts do not: what stays of a head when training is over are the layers of the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


class Loan(nn.Module):
    """Parameters by dotted names, left out of state dicts.

    Args:
        parameters: The parameters by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        inside: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in parameters.items():
            first, _, rest = name.partition(".")
            if rest:
                inside.setdefault(first, {})[rest] = parameter
            else:
                self.register_parameter(first, parameter)
        for name, below in inside.items():
            self.add_module(name, Loan(below))

    def _save_to_state_dict(self, *_: Any) -> None:
        """Write nothing."""

    def _load_from_state_dict(self, *_: Any) -> None:
        """Expect nothing."""
