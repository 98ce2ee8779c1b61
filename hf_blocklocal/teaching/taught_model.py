"""A model and what teaches it, as one module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from hf_blocklocal.feedback import FeedbackHead


class TaughtModel(nn.Module):
    """A model and its feedback heads, side by side: one module for optimizers and for `zero_grad`.

    What else it is asked for, such as `config` or `save_pretrained`, is the model's.

    Args:
        model: The model, which stays an ordinary one.
        heads: The feedback head of every block but the last.
    """

    def __init__(self, model: nn.Module, heads: Iterable[FeedbackHead]) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleList(heads)

    def __getattr__(self, name: str) -> Any:
        """Return what the model has by that name, where this module has nothing."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "heads") or name.startswith("__"):  # not there yet, or how a copy is made
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model alone."""
        return self.model(*args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> Any:
        """Save the model without its heads.

        Args:
            save_directory: The folder.
            *args: As for the model's own method.
            state_dict: Weights to save in place of the model's: its own, or those of this module.
            **kwargs: As for the model's own method.
        """
        if state_dict is not None and not state_dict.keys() <= self.model.state_dict().keys():
            named = ((name.removeprefix("model."), value) for name, value in state_dict.items())
            state_dict = {name: value for name, value in named if not name.startswith("heads.")}
        return self.model.save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)


def name_of_original(name: str) -> str:
    """Return the name, in a `TaughtModel`, of the weight that one of its parameters is a copy of, or its own."""
    head, _, original = name.partition(".loan.")
    return f"model.{original}" if original and head.startswith("heads.") else name
