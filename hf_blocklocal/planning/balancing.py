"""Cut a model into blocks that cost the same to train, their heads included.

What is counted are the floating-point operations of one traced batch: those of the layers, which the trace has
counted, and those of the head that a block would have which ends behind each layer. The language-model head counts
with the last layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from hf_blocklocal.anatomy.embeddings import target_embedding
from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.cut.blocks import Boundaries, Cut
from hf_blocklocal.cut.inlets import Inlets
from hf_blocklocal.cut.needs import trace_needs
from hf_blocklocal.cut.partition import Span, cheapest_spans, even_spans
from hf_blocklocal.cut.trace import Trace, trace_reach
from hf_blocklocal.planning.head_costs import FORWARD_AND_BACKWARD, head_operations
from hf_blocklocal.teaching.building import build_heads, build_shortcut
from hf_blocklocal.teaching.reading import contrasts_tokens, targets_for
from hf_blocklocal.teaching.step import LocalStep


# A head that trains what it borrows computes a third product, for the weights; one that does not stops at two.
_TRAINED = 1.5


def cut_behind_every_layer(trace: Trace) -> Cut:
    """Return the cut of a traced model in which each layer is a block."""
    num_layers = len(trace.layers)
    return Cut(trace.layers, trace.stacks, tuple(even_spans(num_layers, num_layers)))


def balanced_cut(model: nn.Module, config: BlockLocalConfig, trace: Trace, inputs: Mapping[str, Any]) -> Cut:
    """Cut a traced model so that the costliest block is as cheap as possible.

    Operations are counted, not timed: whoever traces the same batch comes to the same cut. No gradient is left, and
    no random stream moves on.

    Args:
        model: The model.
        config: How it is to be cut and taught, with nothing left open about its heads.
        trace: What one batch has shown of it.
        inputs: That batch.

    Raises:
        CutError: If a block would be left without a layer.
        UnsupportedSettingError: If a head that ends somewhere cannot borrow what it is to borrow.
    """
    heads = operations_of_heads(model, config, trace, inputs)
    runs = 2 if config.denoising > 0 else 1
    total = [0.0, *accumulate(FORWARD_AND_BACKWARD * cost for cost in trace.costs)]

    def cost(block: int, span: Span) -> float:
        of_layers = total[span.stop] - total[span.start]
        return of_layers if block == config.num_blocks - 1 else runs * of_layers + heads[span.last]

    spans = cheapest_spans(len(trace.layers), config.num_blocks, cost)
    return Cut(trace.layers, trace.stacks, tuple(spans))


def operations_of_heads(
    model: nn.Module, config: BlockLocalConfig, trace: Trace, inputs: Mapping[str, Any]
) -> list[float]:
    """Count, for each layer, what the head of a block that ends there would compute in a step; 0 for the last layer.

    Args:
        model: The model.
        config: How it is to be taught, with nothing left open about its heads.
        trace: What one batch has shown of it.
        inputs: That batch; without a target that counts, all heads cost nothing.
    """
    cut = cut_behind_every_layer(trace)
    boundaries = Boundaries(model, cut)
    with torch.random.fork_rng(devices=[]):
        heads = nn.ModuleList(build_heads(model, config, trace, cut, label_smoothing=0.0))
    heads.to(next(model.parameters()).device)
    shortcut = None
    if config.borrows:
        boundaries.carried = trace_needs(model, boundaries, inputs).lasting
        reach = trace_reach(model, boundaries, inputs)
        shortcut = build_shortcut(model, config, trace, cut, inputs, reach)
    inlets = Inlets(model, boundaries) if config.reconstruction > 0 else None
    negatives = None if shortcut is not None and not shortcut.confines else config.negatives
    embedding = target_embedding(model) if contrasts_tokens(trace.task, heads) else None
    targets = targets_for(trace.task, inputs, embedding, negatives=negatives)
    if len(targets) == 0:
        return [0.0] * len(trace.layers)
    step = LocalStep(boundaries, heads, shortcut=shortcut, inlets=inlets)
    factor = _TRAINED if config.borrows and config.head_copies == "trained" else 1.0
    return [factor * count for count in head_operations(model, step, inputs, targets)] + [0.0]
