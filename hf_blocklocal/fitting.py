"""Tell whether tensors from a file are those that are expected: the same names, the same shapes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def first_misfit(here: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> str | None:
    """Describe the first tensor, by name, that differs in shape or is on one side only; None if all fit.

    Args:
        here: The tensors that are expected.
        there: Those that a file holds.
    """
    shapes_here, shapes_there = (
        {name: tuple(tensor.shape) for name, tensor in side.items()} for side in (here, there)
    )
    if shapes_here == shapes_there:
        return None
    name = sorted(dict(shapes_here.items() ^ shapes_there.items()))[0]
    return (
        f"{name} has shape {shapes_there.get(name)} in the file and {shapes_here.get(name)} here "
        "(None: it is not there)"
    )
