"""Everything that block-local training adds to a model: from a config and one small batch to a cut with its heads.

This is the place to start for a training loop of one's own; the trainer does no more than call it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hf_blocklocal.anatomy.embeddings import target_embedding
from hf_blocklocal.anatomy.layers import check_all_layers_run, check_layers_not_shared, find_stacks, is_pretrained
from hf_blocklocal.anatomy.routers import find_router_loss
from hf_blocklocal.anatomy.tying import shared_by_blocks, with_shared_weights_settled_, with_tied_weights_settled_
from hf_blocklocal.borrowing.copies import Copies
from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.config.defaults import refreshed, settled
from hf_blocklocal.config.refusals import check_adapters, check_quantisation
from hf_blocklocal.cut.blocks import Boundaries, Cut
from hf_blocklocal.cut.inlets import Inlets
from hf_blocklocal.cut.needs import Needs, trace_needs
from hf_blocklocal.cut.partition import Span
from hf_blocklocal.cut.trace import owners_of, plan_cut, plan_spans, trace_layers, trace_reach
from hf_blocklocal.errors import UnsupportedSettingError
from hf_blocklocal.optim.groups import factors_by_block, rates_of_feedback, scale_learning_rates_
from hf_blocklocal.planning.balancing import balanced_cut
from hf_blocklocal.planning.head_costs import head_costs, warn_of_heavy_heads
from hf_blocklocal.targets.batch import Targets, Task, labels_of
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
from hf_blocklocal.teaching.describing import table_of_blocks
from hf_blocklocal.teaching.reading import contrasts_tokens, targets_for
from hf_blocklocal.teaching.step import LocalStep
from hf_blocklocal.teaching.taught_model import TaughtModel, name_of_original


@dataclass(frozen=True)
class Assembly:
    """A model ready to be trained block by block.

    Attributes:
        config: How it is cut and taught, with nothing left open.
        task: What it is to predict; None with a single block, which asks for nothing but the model's own loss.
        cut: Where it is cut.
        module: The model with its heads.
        parameters: The parameters of each block and its head, in the model's order.
        step: Runs one local training step.
        counts_items: Whether the model's own loss heeds `num_items_in_batch`.
        forms: For each layer, 0 if it returns its hidden state, n if it returns a tuple of n that starts with it.
        owners: The block that owns each parameter of the model, by name.
        lent: For each block but the last, the names of the parameters of later blocks that its head uses.
        copies: Copies of those, if the config asks for any; else heads use live ones.
        needs: What each block needs to be run by itself, if blocks are apart or heads borrow.
        head_costs: Operations of each head as a share of those of its block, forward and backward, in the traced
            batch; none where that has no target that counts.
        parts: For each parameter of the model that is spread over several processes, what is here of it, which is in
            `parameters` in its place.
        shared: The names of the parameters that the losses of several blocks reach.
        chooses_rates: Whether a user has said at which rates blocks learn.
    """

    config: BlockLocalConfig
    task: Task | None
    cut: Cut
    module: TaughtModel
    parameters: tuple[tuple[nn.Parameter, ...], ...]
    step: LocalStep
    counts_items: bool
    forms: tuple[int, ...] = ()
    owners: Mapping[str, int] = field(default_factory=dict)
    lent: tuple[set[str], ...] = ()
    copies: Copies | None = None
    needs: Needs | None = None
    head_costs: tuple[float, ...] = ()
    parts: Mapping[nn.Parameter, nn.Parameter] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    chooses_rates: bool = False

    @property
    def heads(self) -> nn.ModuleList:
        """The feedback head of every block but the last."""
        return self.module.heads

    @property
    def last(self) -> int:
        """The last block, which learns from the model's own loss."""
        return self.cut.num_blocks - 1

    @property
    def originals(self) -> dict[nn.Parameter, nn.Parameter]:
        """For each copy that a head trains, the weight of the model that it is a copy of."""
        named = dict(self.module.named_parameters())
        pairs = ((parameter, named[name_of_original(name)]) for name, parameter in named.items())
        return {copy: original for copy, original in pairs if copy is not original}

    @property
    def couples(self) -> bool:
        """Whether gradients of a block come from other losses than its own too."""
        config = self.config
        global_steps = config.global_every is not None or config.polish > 0
        learned = any(self.module.model.get_parameter(name).requires_grad for name in self.shared)
        return config.overlap > 0 or global_steps or learned

    def read_targets(
        self, inputs: Mapping[str, Any], *, seed: tuple[int, ...] = (0,), whole_vocabulary: bool = False
    ) -> Targets | None:
        """Read what a batch is to be taught; nothing with a single block.

        Args:
            inputs: The model's inputs with labels.
            seed: What the negatives of a vocabulary are drawn from, for example run, step and micro-batch.
            whole_vocabulary: Whether to contrast with all tokens, as an evaluation does.
        """
        if self.task is None:
            return None
        embedding, negatives = None, None
        if contrasts_tokens(self.task, self.heads):
            embedding, shortcut = target_embedding(self.module.model), self.step.shortcut
            whole_vocabulary = whole_vocabulary or (shortcut is not None and not shortcut.confines)
            negatives = None if whole_vocabulary else self.config.negatives
            embedding = embedding if self.copies is None else self.copies[embedding]
        return targets_for(self.task, inputs, embedding, negatives=negatives, seed=seed)

    def lower_weights(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters of the model that are here and belong to a block below the last, by name."""
        lower = {parameter for block in self.parameters[: self.last] for parameter in block}
        named = ((name, self.parts.get(whole, whole)) for name, whole in self.module.model.named_parameters())
        here = ((name, parameter) for name, parameter in named if parameter in lower and not parameter.is_meta)
        return {name: parameter for name, parameter in here if parameter.requires_grad}

    def begin_step(self, step: int) -> None:
        """Take the copies that are due before an optimizer step. Calls after the first for a step do nothing.

        Args:
            step: Optimizer steps taken so far.
        """
        if self.copies is not None:
            self.copies.advance_(step)

    def check_last_block_learns(self) -> None:
        """Refuse to train where the model's own loss has nothing to teach.

        Raises:
            UnsupportedSettingError: If no parameter of the last block of several is trainable.
        """
        if self.last > 0 and not any(parameter.requires_grad for parameter in self.parameters[self.last]):
            span = self.cut.spans[self.last]
            raise UnsupportedSettingError(
                f"Block {self.last} (layers {span.start} to {span.last} and the task head) has no trainable "
                "parameter, so the model's own loss teaches nothing, and it cannot reach the layers below. "
                "Unfreeze the task head or a layer there, or use num_blocks=1."
            )

    def set_learning_rates_(self, optimizer: torch.optim.Optimizer, *, has_schedule: bool = False) -> Assembly:
        """Give the groups of an optimizer of all parameters the learning rates that the config asks for.

        Args:
            optimizer: The optimizer, changed in place, before a schedule is made for it.
            has_schedule: Whether it has one already, which is an error if a rate is to be changed.

        Returns:
            This assembly; with one rate for all blocks, where the optimizer cannot have several and nobody asked.

        Raises:
            UnsupportedSettingError: If the optimizer cannot have different rates.
        """
        decay, feedback_rate = self.config.block_lr_decay, self.config.feedback_learning_rate
        asked = {
            "block_lr_decay": decay not in (None, 1) and self.chooses_rates,
            "feedback_learning_rate": feedback_rate is not None,
        }
        as_said = scale_learning_rates_(
            optimizer,
            self._learning_rate_factors(decay),
            rates=rates_of_feedback(self.heads, feedback_rate),
            option=" with ".join(name for name, is_asked in asked.items() if is_asked),
            has_schedule=has_schedule,
        )
        return self if as_said else replace(self, config=replace(self.config, block_lr_decay=1.0))

    def _learning_rate_factors(self, decay: float | None) -> dict[nn.Parameter, float]:
        """Return what the learning rate of each parameter is multiplied with.

        A head has the run's rate, but for copies that it trains: they learn as fast as what they are copies of.
        """
        factors, originals = factors_by_block(self.parameters, decay), self.originals
        return factors | {mine: factors.get(originals.get(mine), 1.0) for mine in self.heads.parameters()}

    def describe(self) -> str:
        """Return the cut as a table: block, layers, parameters of block and head, cost of the head, its kind."""
        model, cut = self.module.model, self.cut
        return table_of_blocks(model, cut, self.config, self.parameters, self.heads, self.head_costs)


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
    device = labels_of(inputs).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        heads = build_heads(model, config, trace, cut, label_smoothing)
    module = TaughtModel(model, heads)
    module.heads.to(device)
    router_loss = find_router_loss(model)
    boundaries = Boundaries(model, cut, router_loss.routers if router_loss else None)
    reach = trace_reach(model, boundaries, inputs)
    config = with_shared_weights_settled_(model, config, reach, asked=asked == "untie")
    needs = trace_needs(model, boundaries, inputs) if config.borrows or config.blocks_apart else None
    boundaries.carried = needs.lasting if config.borrows else {}
    inlets = Inlets(model, boundaries) if config.denoising > 0 or config.reconstruction > 0 else None
    denoising = None
    if config.denoising > 0:
        denoising = build_denoising(model, config, trace, boundaries, inlets, reach)
    owners = owners_of((name for name, _ in model.named_parameters()), cut, reach)
    shortcut = build_shortcut(model, config, trace, cut, inputs, reach) if config.borrows else None
    contrasts = contrasts_tokens(trace.task, heads)
    lent = lent_to_heads(model, shortcut, owners, cut.num_blocks, contrasts_tokens=contrasts)
    config = refreshed(config) if any(lent) else config
    copies = build_copies(model, config, lent, shortcut)
    if copies is not None:
        lend_to_train_(heads, copies)
    assembly = Assembly(
        config=config,
        task=trace.task,
        cut=cut,
        module=module,
        parameters=_by_block(module, owners, cut.num_blocks),
        step=LocalStep(
            boundaries,
            module.heads,
            router_loss=router_loss,
            shortcut=shortcut,
            overlap=config.overlap,
            inlets=inlets,
            denoising=denoising,
            chunked=build_chunked(model, config, inputs),
        ),
        counts_items=trace.counts_items,
        forms=trace.forms,
        owners=owners,
        lent=lent,
        copies=copies,
        needs=needs,
        shared=tuple(shared_by_blocks(reach)),
        chooses_rates=chooses_rates,
    )
    targets = assembly.read_targets(inputs)
    if len(targets) > 0:
        assembly = replace(assembly, head_costs=head_costs(model, assembly.step, trace.costs, inputs, targets))
    warn_of_heavy_heads(assembly.head_costs, config)
    return assembly


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
    )


def _by_block(module: TaughtModel, owners: Mapping[str, int], num_blocks: int) -> tuple[tuple[nn.Parameter, ...], ...]:
    blocks: list[list[nn.Parameter]] = [[] for _ in range(num_blocks)]
    for name, parameter in module.model.named_parameters():
        blocks[owners[name]].append(parameter)
    for block, head in enumerate(module.heads):
        blocks[block].extend(head.parameters())
    return tuple(tuple(block) for block in blocks)
