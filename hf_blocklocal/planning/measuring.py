"""Measure what the parts of a model cost in a training step, on tensors that may be fakes without memory.

The model is cut behind every layer, each with the head that a block ending there would have, and taught one batch; it
runs once more uncut. What the hooks of these two steps read is enough to know the costs of every block of every cut.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_blocklocal.anatomy.embeddings import target_embedding
from hf_blocklocal.anatomy.layers import check_all_layers_run, find_stacks, is_encoder_decoder
from hf_blocklocal.anatomy.routers import find_router_loss
from hf_blocklocal.anatomy.tying import freeze_shared_, with_tied_weights_settled_
from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.config.defaults import settled
from hf_blocklocal.cut.blocks import Boundaries
from hf_blocklocal.cut.needs import trace_needs
from hf_blocklocal.cut.partition import even_spans
from hf_blocklocal.cut.trace import LossTraits, Trace, owners_of, trace_layers, trace_reach
from hf_blocklocal.errors import UnsupportedSettingError
from hf_blocklocal.planning.balancing import cut_behind_every_layer
from hf_blocklocal.planning.model_costs import HeadCosts, LayerCosts, ModelCosts, Weight
from hf_blocklocal.planning.watch import Marks, Watch
from hf_blocklocal.targets.batch import Candidates, Targets, Task, labels_of
from hf_blocklocal.targets.spans import spans_without_values
from hf_blocklocal.teaching.building import build_chunked, build_heads, build_shortcut, can_lend, lent_to_heads
from hf_blocklocal.teaching.reading import contrasts_tokens
from hf_blocklocal.teaching.step import LocalStep


# Fields that add to a step what is not measured here.
_NOT_PLANNED = ("overlap", "denoising", "reconstruction", "bootstrap")


@dataclass(frozen=True)
class Setting:
    """What a plan is made for, beside model and config.

    Attributes:
        inputs: A batch of the size to be planned for, with labels.
        distinct: Distinct tokens among the targets of a batch; None: as many as there are targets.
        autocast: Precision of mixed-precision training; None for none.
        loss_traits: What is known of the model's loss; needed for tensors without values.
    """

    inputs: Mapping[str, Any]
    distinct: int | None = None
    autocast: torch.dtype | None = None
    loss_traits: LossTraits | None = None

    def precision(self) -> torch.autocast:
        """Return the context of a forward pass."""
        device = labels_of(self.inputs).device.type
        return torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None)


def measure_costs(model: nn.Module, config: BlockLocalConfig, setting: Setting) -> ModelCosts:
    """Teach a model one batch, cut behind every layer, and write down what each layer and each head costs.

    Gradients of the model are gone afterwards. Random streams move on.

    Args:
        model: The model; it may be made of fake tensors, and this be called inside their mode. Weights that are tied
            are untied or frozen, as training would do.
        config: How it is to be taught. Its `num_blocks` only decides how many layers heads borrow by default.
        setting: The batch, and what else matters.

    Raises:
        UnsupportedSettingError: If the config asks for terms that are not planned.
        BlockLocalError: If the model cannot be cut or its heads cannot be built.
    """
    _check_planned(config)
    check_all_layers_run(model)
    config = with_tied_weights_settled_(model, config)
    with setting.precision():
        trace = trace_layers(model, find_stacks(model, config.layers), setting.inputs, setting.loss_traits)
    config = settled(config, single_stack=trace.stacks[-1] == 0, lends=can_lend(model, trace))
    parts = _cut_everywhere(model, config, trace, setting)
    num_layers, heads = len(trace.layers), parts.step.heads
    targets = assumed_targets(model, trace.task, setting, negatives=parts.negatives(config))
    whole = replace(parts.step.boundaries.cut, spans=tuple(even_spans(num_layers, 1)))
    apart, in_first, together = (Marks(num_layers) for _ in range(3))
    _teach(model, parts.step, targets, setting, apart)
    if parts.in_first is None:
        in_first = apart
    else:
        _teach(model, parts.in_first, targets, setting, in_first)
    _teach(model, LocalStep(Boundaries(model, whole), []), None, setting, together)
    return ModelCosts(
        layers=tuple(_layer(apart, together, layer) for layer in range(num_layers)),
        heads=tuple(
            _head(apart, in_first, head, block, parts.lent[block], parts.trains[block])
            for block, head in enumerate(heads)
        ),
        weights=parts.weights,
    )


@dataclass(frozen=True)
class _Parts:
    """A model cut behind every layer.

    Attributes:
        step: Its local step.
        in_first: The same with all heads as if they stood in the first block; None where that changes nothing.
        lent: For each block but the last, what its head borrows.
        trains: For each block but the last, what of that its head trains copies of.
        weights: All weights by name.
    """

    step: LocalStep
    in_first: LocalStep | None
    lent: list[set[str]]
    trains: list[set[str]]
    weights: dict[str, Weight]

    def negatives(self, config: BlockLocalConfig) -> int | None:
        """Return the negatives of a contrast, None for the whole vocabulary."""
        shortcut = self.step.shortcut
        return None if shortcut is not None and not shortcut.confines else config.negatives


def _cut_everywhere(model: nn.Module, config: BlockLocalConfig, trace: Trace, setting: Setting) -> _Parts:
    num_layers = len(trace.layers)
    cut = cut_behind_every_layer(trace)
    router_loss = find_router_loss(model)
    boundaries = Boundaries(model, cut, router_loss.routers if router_loss else None)
    reach = trace_reach(model, boundaries, setting.inputs)
    if config.tied_weights == "freeze":
        freeze_shared_(model, reach)
    owners = owners_of((name for name, _ in model.named_parameters()), cut, reach)
    step = LocalStep(
        boundaries,
        nn.ModuleList(build_heads(model, config, trace, cut, label_smoothing=0.0)),
        router_loss=router_loss,
        chunked=build_chunked(model, config, setting.inputs),
    )
    in_first = None
    if config.borrows:
        has_values, confines = setting.loss_traits is None, None
        boundaries.carried = trace_needs(model, boundaries, setting.inputs, has_values=has_values).lasting
        if not has_values:
            confines = trace.task.target == "vocabulary" and _has_plain_head(model)
        step.shortcut = build_shortcut(model, config, trace, cut, setting.inputs, reach, confines=confines)
    contrasts = contrasts_tokens(trace.task, step.heads)
    lent = list(lent_to_heads(model, step.shortcut, owners, num_layers, contrasts_tokens=contrasts))
    trains: list[set[str]] = [set() for _ in lent]
    if config.borrows:
        if config.head_copies == "trained":  # what is copied costs as much, whoever gets the gradient
            trains = step.shortcut.taught_weights(lent)
        all_trained = [*trains, set()]
        shortcut = step.shortcut
        step.shortcut = shortcut.with_own([mine | copied for mine, copied in zip(reach, all_trained, strict=True)])
        if any(reach[0] & names for names in lent):
            up_to = [set().union(*reach[: block + 1]) for block in range(num_layers)]
            in_first = copy.copy(step)
            in_first.shortcut = shortcut.with_own([mine | new for mine, new in zip(up_to, all_trained, strict=True)])
    weights = {
        name: Weight(
            parameter.numel(),
            parameter.numel() * parameter.element_size(),
            parameter.requires_grad,
            tuple(sorted({block for block, mine in enumerate(reach) if name in mine} | {owners[name]})),
            inside=cut.layer_of_path(name) is not None,
        )
        for name, parameter in model.named_parameters()
    }
    return _Parts(step, in_first, lent, trains, weights)


def assumed_targets(model: nn.Module, task: Task, setting: Setting, *, negatives: int | None) -> Targets:
    """Return targets as `read_targets` does, for labels without values: every label is taken to count.

    Args:
        model: The model.
        task: What is to be predicted.
        setting: The batch, and how many of its targets are distinct.
        negatives: Negatives of a contrast over a vocabulary; None is the whole vocabulary.
    """
    inputs = setting.inputs
    if task.target == "spans":
        return spans_without_values(inputs)
    labels = inputs["labels"]
    shape, device = labels.shape, labels.device
    if not task.per_position:
        samples_N = torch.arange(shape[0], device=device)
        values = labels.flatten() if task.target == "classes" else labels.float().reshape(shape[0], -1)
        return Targets(task, values, samples_N, stretched="input_values" in inputs or "input_features" in inputs)
    length = shape[1] - 1 if task.shifted else shape[1]
    positions_N = (
        torch.arange(shape[0], device=device)[:, None] * shape[1] + torch.arange(length, device=device)
    ).flatten()
    values = torch.zeros_like(positions_N)
    targets = Targets(task, values, positions_N // shape[1], positions_N)
    if task.target != "vocabulary":
        return targets
    embedding_VE = target_embedding(model).detach()
    vocabulary = embedding_VE.shape[0]
    distinct = min(setting.distinct or len(targets), len(targets), vocabulary)
    if negatives is None or negatives >= vocabulary - distinct:
        return replace(
            targets, candidates=Candidates(embedding_VE, torch.zeros(vocabulary, device=device), vocabulary)
        )
    ids_C = torch.arange(distinct + negatives, device=device) % vocabulary
    return replace(
        targets, candidates=Candidates(embedding_VE[ids_C], torch.zeros(len(ids_C), device=device), vocabulary, ids_C)
    )


def _teach(
    model: nn.Module,
    step: LocalStep,
    targets: Targets | None,
    setting: Setting,
    marks: Marks,
) -> None:
    """Run one training step and note the marks."""
    watch = Watch(model, step.heads, step.boundaries, marks)
    was_training = model.training
    model.train()
    try:
        with watch.watching():
            lesson = step.teach(
                targets, scale=1.0, backward=watch.backward, learned=lambda *_: None, inputs=setting.inputs, seed=(0,)
            )
            with lesson:
                with setting.precision():
                    outputs = model(**setting.inputs)
                watch.backward(outputs["loss"] if isinstance(outputs, Mapping) else outputs[0])
    finally:
        model.train(was_training)
        model.zero_grad()
        for head in step.heads:
            head.zero_grad()


def _layer(apart: Marks, together: Marks, layer: int) -> LayerCosts:
    last = len(apart.left) - 1
    begins = apart.done[layer - 1] if layer > 0 else (0, 0)
    ends = apart.sent[last] if layer == last else apart.left[layer]
    asked = apart.sent[last] if layer == last else apart.arrived[layer]
    asked_together = together.sent[last] if layer == last else together.arrived[layer]
    answered = together.arrived[layer - 1] if layer > 0 else together.done[last]
    before = together.left[layer - 1] if layer > 0 else (0, 0)
    behind = together.sent[last] if layer == last else together.left[layer]
    return LayerCosts(
        forward=ends[0] - begins[0],
        backward=answered[0] - asked_together[0],
        backward_opening=apart.done[layer][0] - asked[0],
        saved_bytes=behind[1] - before[1],
        saved_bytes_opening=ends[1] - begins[1],
        message_bytes=together.message_bytes[layer],
    )


def _head(
    apart: Marks, in_first: Marks, head: nn.Module, block: int, borrows: set[str], trains: set[str]
) -> HeadCosts:
    parameters = list(head.parameters())
    return HeadCosts(
        operations=apart.arrived[block][0] - apart.left[block][0],
        operations_in_first=in_first.arrived[block][0] - in_first.left[block][0],
        saved_bytes=apart.sent[block][1] - apart.left[block][1],
        saved_bytes_in_first=in_first.sent[block][1] - in_first.left[block][1],
        parameters=sum(parameter.numel() for parameter in parameters),
        weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        borrows=frozenset(borrows),
        trains=frozenset(trains),
    )


def _check_planned(config: BlockLocalConfig) -> None:
    for name in _NOT_PLANNED:
        if getattr(config, name):
            raise UnsupportedSettingError(
                f"{name}={getattr(config, name)!r} adds to a step what a plan does not measure. Plan without it, and "
                "leave room for it."
            )


def _has_plain_head(model: nn.Module) -> bool:
    """Tell what `can_be_confined` finds out by running a model, as far as that shows without values."""
    return type(model.get_output_embeddings()) is nn.Linear and not is_encoder_decoder(model)
