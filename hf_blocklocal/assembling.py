"""Everything that block-local training adds to a model: from a config and one small batch to a cut with its heads.

This is the place to start for a training loop of one's own; the trainer does no more than call it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_blocklocal.anatomy.layers import check_all_layers_run, check_layers_not_shared, find_stacks, is_pretrained
from hf_blocklocal.anatomy.routers import RouterLoss, find_router_loss
from hf_blocklocal.anatomy.tying import shared_by_blocks, with_shared_weights_settled_, with_tied_weights_settled_
from hf_blocklocal.assembly import Assembly, fingerprint_of
from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.config.defaults import refreshed, settled
from hf_blocklocal.config.refusals import check_adapters, check_quantisation
from hf_blocklocal.cut.blocks import Boundaries, Cut
from hf_blocklocal.cut.inlets import Inlets
from hf_blocklocal.cut.needs import trace_needs
from hf_blocklocal.cut.partition import Span
from hf_blocklocal.cut.trace import Trace, owners_of, plan_cut, plan_spans, trace_layers, trace_reach
from hf_blocklocal.feedback import FeedbackHead
from hf_blocklocal.planning.balancing import balanced_cut
from hf_blocklocal.planning.head_costs import head_costs, warn_of_heavy_heads
from hf_blocklocal.targets.batch import labels_of
from hf_blocklocal.teaching.building import (
    build_chunked,
    build_copies,
    build_denoising,
    build_heads,
    build_shortcut,
    can_lend,
    lend_to_train_,
    lent_to_heads,
)
from hf_blocklocal.teaching.reading import contrasts_tokens
from hf_blocklocal.teaching.step import LocalStep
from hf_blocklocal.teaching.taught_model import TaughtModel


def check_structure(model: nn.Module, config: BlockLocalConfig) -> None:
    """Refuse, without running anything, what can be seen to be impossible. A single block is always possible.

    Raises:
        LayersNotFoundError: If no layers are found.
        SharedLayersError: If layers are shared across depth.
        UnsupportedSettingError: If layers are dropped at random, adapters couple them, or weights are
            quantised so that they cannot learn.
        CutError: If there are more blocks than layers.
    """
    if config.num_blocks == 1:
        return
    check_adapters(model)
    check_quantisation(model, config)
    stacks = find_stacks(model, config.layers)
    check_layers_not_shared(model, stacks, config.num_blocks)
    plan_spans(config, sum(len(stack.layers) for stack in stacks))
    check_all_layers_run(model)


def assemble(
    model: nn.Module,
    config: BlockLocalConfig,
    inputs: Mapping[str, Any],
    *,
    label_smoothing: float = 0.0,
    seed: int = 0,
) -> Assembly:
    """Cut a model and give every block but the last a feedback head.

    Args:
        model: A transformers model with a task head, on its device.
        config: How to cut and teach it.
        inputs: A small batch with labels, on the same device; it is run a few times without dropout. Not looked at
            with a single block.
        label_smoothing: Weight of the uniform distribution mixed into class targets.
        seed: Seed of the heads' first weights. The caller's random stream is left untouched.

    Raises:
        BlockLocalError: If model, cut, batch and config do not go together; the subclass and the text say how.
    """
    check_structure(model, config)
    if config.num_blocks == 1:
        return _uncut(model, config)
    asked, config = config.tied_weights, with_tied_weights_settled_(model, config)
    trace = trace_layers(model, find_stacks(model, config.layers), inputs)
    chooses_rates, pretrained = config.block_lr_decay is not None, is_pretrained(model)
    config = settled(config, single_stack=trace.stacks[-1] == 0, lends=can_lend(model, trace), pretrained=pretrained)
    cut = balanced_cut(model, config, trace, inputs) if config.balance == "cost" else plan_cut(trace, config)
    heads = _seeded_heads(model, config, trace, cut, label_smoothing, seed=seed, device=labels_of(inputs).device)
    module = TaughtModel(model, heads)
    router_loss = find_router_loss(model)
    boundaries = Boundaries(model, cut, router_loss.routers if router_loss else None)
    reach = trace_reach(model, boundaries, inputs)
    config = with_shared_weights_settled_(model, config, reach, asked=asked == "untie")
    needs = trace_needs(model, boundaries, inputs) if config.borrows or config.blocks_apart else None
    boundaries.carried = needs.lasting if config.borrows else {}
    step = _step(model, config, trace, boundaries, module.heads, inputs, reach, router_loss)
    owners = owners_of((name for name, _ in model.named_parameters()), cut, reach)
    contrasts = contrasts_tokens(trace.task, heads)
    lent = lent_to_heads(model, step.shortcut, owners, cut.num_blocks, contrasts_tokens=contrasts)
    config = refreshed(config) if any(lent) else config
    copies = build_copies(model, config, lent, step.shortcut)
    if copies is not None:
        lend_to_train_(heads, copies)
    assembly = Assembly(
        config=config,
        task=trace.task,
        cut=cut,
        module=module,
        parameters=_by_block(module, owners, cut.num_blocks),
        step=step,
        counts_items=trace.counts_items,
        forms=trace.forms,
        owners=owners,
        lent=lent,
        copies=copies,
        needs=needs,
        shared=tuple(shared_by_blocks(reach)),
        chooses_rates=chooses_rates,
        fingerprint=fingerprint_of(model, trained=config.head_copies == "trained"),
    )
    targets = assembly.read_targets(inputs)
    if len(targets) > 0:
        assembly = replace(assembly, head_costs=head_costs(model, assembly.step, trace.costs, inputs, targets))
    warn_of_heavy_heads(assembly.head_costs, config)
    return assembly


def _seeded_heads(
    model: nn.Module,
    config: BlockLocalConfig,
    trace: Trace,
    cut: Cut,
    label_smoothing: float,
    *,
    seed: int,
    device: torch.device,
) -> list[FeedbackHead]:
    """Build the heads with the same weights in every process, and leave the caller's random stream as it is."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return [head.to(device) for head in build_heads(model, config, trace, cut, label_smoothing)]


def _step(
    model: nn.Module,
    config: BlockLocalConfig,
    trace: Trace,
    boundaries: Boundaries,
    heads: nn.ModuleList,
    inputs: Mapping[str, Any],
    reach: Sequence[set[str]],
    router_loss: RouterLoss | None,
) -> LocalStep:
    """Build what stands at the ends of the blocks, as far as the config asks for it."""
    inlets = Inlets(model, boundaries) if config.denoising > 0 or config.reconstruction > 0 else None
    denoising = None
    if config.denoising > 0:
        denoising = build_denoising(model, config, trace, boundaries, inlets, reach)
    return LocalStep(
        boundaries,
        heads,
        router_loss=router_loss,
        shortcut=build_shortcut(model, config, trace, boundaries.cut, inputs, reach) if config.borrows else None,
        overlap=config.overlap,
        inlets=inlets,
        denoising=denoising,
        chunked=build_chunked(model, config, inputs),
    )


def _uncut(model: nn.Module, config: BlockLocalConfig) -> Assembly:
    """Return a single block: any model at all, as the plain Trainer takes it."""
    cut = Cut(layers=(), stacks=(), spans=(Span(0, 0),))
    module = TaughtModel(model, [])
    return Assembly(
        config=config,
        task=None,
        cut=cut,
        module=module,
        parameters=(tuple(model.parameters()),),
        step=LocalStep(Boundaries(model, cut), []),
        counts_items=True,
        fingerprint=fingerprint_of(model, trained=config.head_copies == "trained"),
    )


def _by_block(module: TaughtModel, owners: Mapping[str, int], num_blocks: int) -> tuple[tuple[nn.Parameter, ...], ...]:
    blocks: list[list[nn.Parameter]] = [[] for _ in range(num_blocks)]
    for name, parameter in module.model.named_parameters():
        blocks[owners[name]].append(parameter)
    for block, head in enumerate(module.heads):
        blocks[block].extend(head.parameters())
    return tuple(tuple(block) for block in blocks)
