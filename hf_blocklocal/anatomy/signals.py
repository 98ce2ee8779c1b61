"""What a layer is given and what it returns: a hidden state, and whatever goes beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor


def given_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the hidden state that a layer is given: its first argument, or the one named so. None if neither is."""
    return args[0] if args else kwargs.get(hidden_name_in(kwargs))


def hands_on(form: int) -> Callable[..., Any]:
    """Return a forward that hands on the hidden state that a layer is given.

    Args:
        form: 0 for a layer that returns its hidden state, n for one that returns a tuple of n that starts with it.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = given_hidden(args, kwargs)
        return hidden if form == 0 else (hidden, *[None] * (form - 1))

    return forward


def with_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Tensor) -> tuple[Any, Any]:
    """Return the arguments of a layer with another hidden state in them."""
    return ((hidden, *args[1:]), dict(kwargs)) if args else (args, {**kwargs, hidden_name_in(kwargs): hidden})


def hidden_name_in(kwargs: Mapping[str, Any]) -> str | None:
    """Return the name under which keyword arguments hold a hidden state, None if they do not."""
    return next((name for name in kwargs if name.startswith("hidden_state")), None)


def first_tensor(output: Any) -> Tensor:
    """Return the hidden state from what a layer returns: the tensor itself, or the first of a sequence."""
    return (
        output
        if isinstance(output, Tensor)
        else next(iter(output.values() if isinstance(output, Mapping) else output))
    )


def beside_hidden(output: Any) -> tuple[Any, ...]:
    """Return what a layer returns beside its hidden state, in its order."""
    if isinstance(output, Tensor):
        return ()
    return tuple(output.values() if isinstance(output, Mapping) else output)[1:]


def made_elsewhere(value: Any, made_here: set[int]) -> bool:
    """Tell whether a value holds a tensor that is not among those with the given ids."""
    elsewhere: list[bool] = []
    map_tensors(value, lambda tensor: elsewhere.append(id(tensor) not in made_here))
    return any(elsewhere)


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to every tensor in nested tuples, lists and mappings.

    Sequences are built anew; mappings are changed in place, because layers share them to hand states to each other.
    A function that returns nothing leaves its tensor alone.
    """
    if isinstance(value, Tensor):
        result = function(value)
        return value if result is None else result
    if isinstance(value, tuple | list):
        items = [map_tensors(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, MutableMapping):
        for key, item in list(value.items()):
            value[key] = map_tensors(item, function)
    return value
