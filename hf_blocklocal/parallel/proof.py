"""Prove at set-up that a block by itself gives what it gives inside the whole model, or refuse to split it.

Layers may know of each other in ways that no argument shows: a store that they share, a count, a mask that an earlier
one has changed. So the block runs once as it will in training, without the weights that will be gone, on what the
block below handed on in a run of the whole. What other layers may have left behind is of another run by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_blocklocal.anatomy.modes import evaluation_mode
from hf_blocklocal.anatomy.signals import given_hidden, with_hidden
from hf_blocklocal.cut.blocks import Boundaries, EndOfBlock
from hf_blocklocal.cut.needs import Needs
from hf_blocklocal.errors import SplitError, UnsupportedSettingError
from hf_blocklocal.parallel.stage import Stage, sides_of
from hf_blocklocal.parallel.wire import put_together, take_apart
from hf_blocklocal.randomness import random_state_kept


# Kernels may add up in another order; what a layer did not get shows in digits well before these.
_ROUNDINGS = 64


@dataclass
class _Record:
    """What went in and out of a block in a run of the whole model.

    Attributes:
        arrives: What the block below has handed on; nothing at the first.
        leaves: What the block has handed on; nothing at the last.
        outputs: What the model has returned, by name.
    """

    arrives: Any = None
    leaves: Any = None
    outputs: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def check_block_alone(
    model: nn.Module,
    boundaries: Boundaries,
    block: int,
    *,
    needs: Needs,
    forms: tuple[int, ...],
    gone: Set[str],
    inputs: Mapping[str, Any],
) -> tuple[str, ...]:
    """Run a block of a whole model by itself, and compare. The model is left as it was.

    Args:
        model: The model, all of it.
        boundaries: Its cut.
        block: The block.
        needs: What every block needs.
        forms: As of a `Stage`.
        gone: Names of the parameters that the block will have to do without.
        inputs: A small batch with labels, on the model's device.

    Returns:
        At the last block, the names of outputs beside loss and logits that it cannot tell; elsewhere nothing.

    Raises:
        SplitError: If it gives something else.
        UnsupportedSettingError: If a message holds what cannot be sent.
    """
    with evaluation_mode(model), random_state_kept():
        record = _recorded(model, boundaries, block, needs, inputs)
        with _other_hidden_states(model, boundaries):
            model(**inputs)
        with _parameters_gone(model, gone):
            sent, outputs = _alone(model, boundaries, block, needs, forms, record.arrives, inputs)
    if block < boundaries.cut.num_blocks - 1:
        _compare(model, block, "hands on", record.leaves, sent)
        return ()
    asked = {name for name in record.outputs if "loss" in name or "logits" in name} or set(record.outputs)
    for name in sorted(asked):
        _compare(model, block, f"returns as {name}", record.outputs[name], outputs.get(name))
    return tuple(name for name, value in record.outputs.items() if _difference(value, outputs.get(name)) is not None)


def _recorded(
    model: nn.Module, boundaries: Boundaries, block: int, needs: Needs, inputs: Mapping[str, Any]
) -> _Record:
    """Run the whole model and note what goes in and out of a block."""
    record, cut = _Record(), boundaries.cut
    handed_on: dict[int, list[Any]] = {}
    with ExitStack() as stack:
        for below in (block - 1, block):
            if 0 <= below < cut.num_blocks - 1:
                wanted, message = needs.side_inputs[below + 1], handed_on.setdefault(below, [])

                def note_sides(
                    _layer: nn.Module,
                    args: tuple[Any, ...],
                    kwargs: dict[str, Any],
                    message: list[Any] = message,
                    wanted: frozenset[int | str] = wanted,
                ) -> None:
                    message[:] = [_copied(sides_of(args, kwargs, wanted))]

                def note_output(
                    _layer: nn.Module, _args: tuple[Any, ...], output: Any, message: list[Any] = message
                ) -> None:
                    message.insert(0, _copied(output))

                last = boundaries.exits[below]
                stack.callback(last.register_forward_pre_hook(note_sides, with_kwargs=True).remove)
                stack.callback(last.register_forward_hook(note_output).remove)
        record.outputs = _named_tensors(model(**inputs))
    record.arrives, record.leaves = handed_on.get(block - 1), handed_on.get(block)
    return record


def _alone(
    model: nn.Module,
    boundaries: Boundaries,
    block: int,
    needs: Needs,
    forms: tuple[int, ...],
    arrives: Any,
    inputs: Mapping[str, Any],
) -> tuple[Any, dict[str, Tensor]]:
    """Run a block as in training; return what it hands on, and what the model returns."""
    sent: list[Any] = []
    before, outputs = boundaries.station, {}
    boundaries.station = Stage(
        model,
        boundaries,
        block,
        needs=needs,
        forms=forms,
        receive=lambda: _copied(arrives),
        send=lambda value: sent.append(_copied(value)),
    )
    try:
        with boundaries.attached(lambda *_: None), suppress(EndOfBlock):
            outputs = _named_tensors(model(**inputs))
    except UnsupportedSettingError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _split_error(model, block, f"fails with {type(error).__name__}: {str(error)[:200]}") from error
    finally:
        boundaries.station = before
    return sent[0] if sent else None, outputs


@contextmanager
def _other_hidden_states(model: nn.Module, boundaries: Boundaries) -> Iterator[None]:
    """Give every layer another hidden state inside the `with`, so that what layers leave behind is not the same."""

    def change(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        hidden = given_hidden(args, kwargs)
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
            return None
        return with_hidden(args, kwargs, 1.25 * hidden + hidden.flip(-1))

    with ExitStack() as stack:
        for path in boundaries.cut.layers:
            layer = model.get_submodule(path)
            stack.callback(layer.register_forward_pre_hook(change, with_kwargs=True).remove)
        yield


@contextmanager
def _parameters_gone(model: nn.Module, names: Set[str]) -> Iterator[None]:
    """Take parameters away inside the `with`, as they will be in training."""
    gone = {
        parameter: nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for name, parameter in model.named_parameters()
        if name in names
    }
    places = [
        (module, leaf, parameter)
        for module in model.modules()
        for leaf, parameter in module._parameters.items()
        if parameter in gone
    ]
    for module, leaf, parameter in places:
        module._parameters[leaf] = gone[parameter]
    try:
        yield
    finally:
        for module, leaf, parameter in places:
            module._parameters[leaf] = parameter


def _named_tensors(outputs: Any) -> dict[str, Tensor]:
    """Return the tensors that a model has returned, by name; where it names none, loss and logits are the first."""
    if not isinstance(outputs, Mapping):
        names = ("loss", "logits", *(f"output {number}" for number in range(2, len(outputs))))
        outputs = dict(zip(names, outputs, strict=False))
    return {name: value.clone() for name, value in outputs.items() if isinstance(value, Tensor)}


def _copied(value: Any) -> Any:
    """Return what would arrive in another process."""
    description, tensors = take_apart(value)
    return put_together(description, [tensor.detach().clone() for tensor in tensors])


def _compare(model: nn.Module, block: int, does: str, expected: Any, found: Any) -> None:
    difference = _difference(expected, found)
    if difference is not None:
        raise _split_error(model, block, f"{does} something else: {difference}")


def _difference(expected: Any, found: Any) -> str | None:
    """Say how two values differ by more than rounding, None if they do not."""
    (form, tensors), (other_form, others) = take_apart(expected), take_apart(found)
    if form != other_form:
        return "its parts are others"
    for tensor, other in zip(tensors, others, strict=True):
        if (tensor.shape, tensor.dtype, tensor.device) != (other.shape, other.dtype, other.device):
            return (
                f"{other.dtype} {list(other.shape)} on {other.device} in place of "
                f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
        if torch.equal(tensor, other):
            continue
        if not tensor.is_floating_point():
            return "other whole numbers"
        finite = tensor[tensor.isfinite()].double().abs()
        scale = finite.max().item() if finite.numel() > 0 else 0.0
        allowed = _ROUNDINGS * torch.finfo(tensor.dtype).eps * scale
        if not torch.allclose(tensor.double(), other.double(), rtol=0.0, atol=allowed, equal_nan=True):
            apart = (tensor.double() - other.double()).abs().nan_to_num(nan=float("inf")).max().item()
            return f"{apart:.2g} apart, among values up to {scale:.2g}"
    return None


def _split_error(model: nn.Module, block: int, what: str) -> SplitError:
    return SplitError(
        f"Block {block} of {type(model).__name__}, run by itself on what the block below hands on, {what}. Its layers "
        "know of others in a way that does not show in what they are given, so the model cannot be spread over "
        "processes. Train it in one process, with block_parallel_size=1, or choose other boundaries."
    )
