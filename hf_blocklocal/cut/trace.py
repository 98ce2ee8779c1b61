"""Confirm by one small batch what structure suggests: the order of the layers, their widths, their costs, the task.

Runs the model's own forward without dropout and leaves it as it was; knows nothing of losses or of training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_blocklocal.anatomy.embeddings import vocabulary_size
from hf_blocklocal.anatomy.layers import Stack, check_layers_run_once, shifts_labels
from hf_blocklocal.anatomy.modes import evaluation_mode, everything_trainable
from hf_blocklocal.anatomy.signals import beside_hidden, first_tensor, given_hidden
from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.cut.blocks import Boundaries, Cut
from hf_blocklocal.cut.partition import Span, even_spans, spans_from_boundaries
from hf_blocklocal.errors import CutError, TargetError
from hf_blocklocal.records.operations import operation_counter
from hf_blocklocal.targets.batch import Task, describe_task, labels_of
from hf_blocklocal.targets.spans import SPANS, has_spans, sequence_shape, span_logits


@dataclass(frozen=True)
class Trace:
    """What one batch has shown of a model.

    Attributes:
        layers: Dotted names of the layers in the order of execution.
        stacks: For each layer, the stack it belongs to, numbered in the order of execution.
        shapes: For each layer, the shape of its hidden state.
        entering: For each layer, the shape of the hidden state that it is given; empty where none is found.
        forms: For each layer, 0 if it returns its hidden state, n if it returns a tuple of n that starts with it.
        lends: For each layer, whether it returns tensors beside its hidden state, such as a position bias.
        costs: For each layer, its floating-point operations; those of the parts before the first and behind the last
            layer are added to these two.
        task: What is to be predicted.
        labels_shape: Shape of the labels of the batch; of the input that spans are places in.
        counts_items: Whether the model's loss heeds `num_items_in_batch`.
    """

    layers: tuple[str, ...]
    stacks: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    entering: tuple[tuple[int, ...], ...]
    forms: tuple[int, ...]
    lends: tuple[bool, ...]
    costs: tuple[float, ...]
    task: Task
    labels_shape: tuple[int, ...]
    counts_items: bool

    def ends_in_final_stack(self, layer: int) -> bool:
        """Tell whether a layer belongs to the stack that the model's output comes from."""
        return self.stacks[layer] == self.stacks[-1]


@dataclass(frozen=True)
class LossTraits:
    """What the values of a model's loss would show, for tensors that have none.

    Attributes:
        shifts_labels: Whether position i predicts the label at i + 1.
        counts_items: Whether it heeds `num_items_in_batch`.
    """

    shifts_labels: bool
    counts_items: bool = True


@dataclass
class _Record:
    """What hooks on the layers write down while a model runs; dictionaries by the name of the layer."""

    flops: FlopCounterMode = field(default_factory=operation_counter)
    order: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    entering: dict[str, tuple[int, ...]] = field(default_factory=dict)
    forms: dict[str, int] = field(default_factory=dict)
    lends: dict[str, bool] = field(default_factory=dict)
    marks: list[float] = field(default_factory=list)

    def enter(self, path: str, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a layer begins, and what it is given."""
        hidden = given_hidden(args, kwargs)
        self.entering[path] = () if hidden is None else tuple(hidden.shape)
        self.order.append(path)
        self.marks.append(self.flops.get_total_flops())

    def leave(self, path: str, _layer: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """Note what a layer has returned."""
        self.shapes[path] = tuple(first_tensor(output).shape)
        self.forms[path] = 0 if isinstance(output, Tensor) else len(output)
        self.lends[path] = any(isinstance(item, Tensor) for item in beside_hidden(output))

    def run(self, model: nn.Module, paths: Iterable[str], inputs: Mapping[str, Any]) -> Any:
        """Run a model in evaluation mode with hooks on some layers, and return its output."""
        with ExitStack() as hooks:
            for path in paths:
                layer = model.get_submodule(path)
                entering = layer.register_forward_pre_hook(partial(self.enter, path), with_kwargs=True)
                hooks.callback(entering.remove)
                hooks.callback(layer.register_forward_hook(partial(self.leave, path)).remove)
            with evaluation_mode(model), self.flops:
                return model(**inputs)


@torch.no_grad()
def trace_layers(
    model: nn.Module, stacks: Sequence[Stack], inputs: Mapping[str, Any], loss_traits: LossTraits | None = None
) -> Trace:
    """Run a model once and write down what its layers did.

    Args:
        model: The model.
        stacks: The stacks that structure suggests. One that does not run at all is left aside.
        inputs: A small batch with labels, on the model's device.
        loss_traits: What is known of the model's loss. Without, its values tell, and those of two more runs.

    Raises:
        LayersNotFoundError: If only some layers of a stack ran.
        SharedLayersError: If a layer ran more than once.
        TargetError: If the labels are missing, or no head fits them.
    """
    labels = labels_of(inputs)
    record = _Record()
    outputs = record.run(model, [path for stack in stacks for path in stack.layers], inputs)
    loss = _output(model, outputs, "loss", 0)
    calls = Counter(record.order)
    used = [stack for stack in stacks if any(calls[path] for path in stack.layers)]
    check_layers_run_once(model, {path: calls[path] for stack in (used or stacks) for path in stack.layers})
    stack_of = {path: number for number, stack in enumerate(used) for path in stack.layers}
    return Trace(
        layers=tuple(record.order),
        stacks=tuple(stack_of[path] for path in record.order),
        shapes=tuple(record.shapes[path] for path in record.order),
        entering=tuple(record.entering[path] for path in record.order),
        forms=tuple(record.forms[path] for path in record.order),
        lends=tuple(record.lends[path] for path in record.order),
        costs=_costs(record.marks, record.flops.get_total_flops()),
        task=_task(model, inputs, outputs, loss_traits),
        labels_shape=sequence_shape(inputs) if has_spans(inputs) else tuple(labels.shape),
        counts_items=(_counts_items(model, inputs, loss.device) if loss_traits is None else loss_traits.counts_items),
    )


def _task(model: nn.Module, inputs: Mapping[str, Any], outputs: Any, loss_traits: LossTraits | None) -> Task:
    """Tell from one batch, and what a model has made of it, what is to be predicted."""
    if has_spans(inputs):
        if span_logits(outputs) is None:
            raise TargetError(
                f"{type(model).__name__} was given start_positions and returned no start_logits and end_logits, only "
                f"{sorted(outputs)}. Use a model of AutoModelForQuestionAnswering that scores every position."
            )
        return SPANS
    labels, loss, logits = labels_of(inputs), _output(model, outputs, "loss", 0), _output(model, outputs, "logits", 1)
    return describe_task(
        labels,
        logits,
        vocabulary=vocabulary_size(model),
        shifted=shifts_labels(model, loss, logits, labels) if loss_traits is None else loss_traits.shifts_labels,
        problem_type=getattr(getattr(model, "config", None), "problem_type", None),
    )


def plan_spans(config: BlockLocalConfig, num_layers: int) -> list[Span]:
    """Decide which layers make up which block, as far as that takes no model.

    Args:
        config: How to cut; `balance="cost"` is cut by layers, which finds the same errors.
        num_layers: Layers to cut.

    Raises:
        CutError: If the layers cannot be cut as asked.
    """
    if config.boundaries is not None:
        return spans_from_boundaries(num_layers, config.boundaries)
    return even_spans(num_layers, config.num_blocks)


def plan_cut(trace: Trace, config: BlockLocalConfig) -> Cut:
    """Decide where to cut a traced model, by boundaries or by layers.

    Raises:
        CutError: If the layers cannot be cut as asked.
    """
    return Cut(trace.layers, trace.stacks, tuple(plan_spans(config, len(trace.layers))))


def trace_reach(
    model: nn.Module,
    boundaries: Boundaries,
    inputs: Mapping[str, Any],
    *,
    hand_on: Callable[[Tensor], Tensor] = Tensor.detach,
    observe: Callable[[int, int | str, Any], None] | None = None,
) -> list[set[str]]:
    """Find out which parameters the loss of each block reaches, those among them that are frozen now.

    Args:
        model: The model.
        boundaries: Its cut.
        inputs: A small batch with labels, on the model's device.
        hand_on: Makes, of the output of a block, what the next one is given.
        observe: Told of side inputs, as by `Boundaries.attached`.

    Returns:
        For each block, names of parameters, without those of its head.

    Raises:
        CutError: If the loss of a block reaches a layer of another one, so that no cut is possible here.
    """
    cut = boundaries.cut
    names = {parameter: name for name, parameter in model.named_parameters()}
    reach: list[set[str]] = [set() for _ in cut.spans]

    def note(block: int, output: Tensor, router_logits: tuple[Tensor, ...] = ()) -> Tensor:
        reach[block] = {names[parameter] for parameter in reached_parameters(output) if parameter in names}
        for name in reach[block]:
            inside = cut.block_of_path(name)
            if inside not in (None, block):
                raise CutError(
                    f"The loss of block {block} would reach {name}, a layer of block {inside}: {type(model).__name__} "
                    "hands something between its layers that cannot be cut here. Choose other boundaries."
                )
        return hand_on(output)

    with (
        everything_trainable(model),
        evaluation_mode(model),
        torch.enable_grad(),
        boundaries.attached(note, observe=observe),
    ):
        outputs = model(**inputs)
        note(cut.num_blocks - 1, _output(model, outputs, "loss", 0))
    return reach


def owners_of(names: Iterable[str], cut: Cut, reach: Sequence[set[str]]) -> dict[str, int]:
    """Decide which block owns which parameter.

    A parameter inside a layer belongs to that layer's block. One outside belongs to the last block whose loss reaches
    it, so that a tied embedding is stepped when the gradients of both its uses are there; to the last block of all if
    no loss reaches it.
    """

    def owner(name: str) -> int:
        inside = cut.block_of_path(name)
        if inside is not None:
            return inside
        return max((block for block, mine in enumerate(reach) if name in mine), default=cut.num_blocks - 1)

    return {name: owner(name) for name in names}


def _costs(marks: Sequence[float], total: float) -> tuple[float, ...]:
    """Turn the operations counted when each layer was entered into the cost of each layer."""
    edges = [0.0, *marks[1:], total]
    return tuple(float(stop - start) for start, stop in zip(edges, edges[1:], strict=False))


def _counts_items(model: nn.Module, inputs: Mapping[str, Any], device: torch.device) -> bool:
    accepts = getattr(model, "accepts_loss_kwargs", True)
    if not accepts:
        return False
    try:
        with evaluation_mode(model):
            few, many = (
                _output(model, model(**inputs, num_items_in_batch=count), "loss", 0).item()
                for count in (torch.ones((), device=device), torch.full((), 2.0, device=device))
            )
    except TypeError:
        return False
    return few == few and few != many  # a loss that is not a number says nothing


def _output(model: nn.Module, outputs: Any, name: str, position: int) -> Tensor:
    if isinstance(outputs, Mapping):
        value = outputs.get(name)
    else:
        value = outputs[position] if len(outputs) > position else None
    if not isinstance(value, Tensor):
        returned = sorted(outputs) if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}"
        raise TargetError(
            f"{type(model).__name__} returned {returned} for a batch with labels, but no {name!r}. Block-local "
            "learning needs a model with a task head that computes its own loss."
        )
    return value


def reached_parameters(output: Tensor) -> set[nn.Parameter]:
    """Return the parameters that a backward pass from a tensor would reach, without running it."""
    reached: set[nn.Parameter] = set()
    seen: set[torch.autograd.graph.Node] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(node.variable)
        waiting.extend(parent for parent, _ in node.next_functions)
    return reached
