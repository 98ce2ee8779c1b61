"""Build what stands at the ends of blocks: heads, the way through what they borrow, and a block's second run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_blocklocal.anatomy.asking import can_be_confined
from hf_blocklocal.anatomy.embeddings import target_embedding
from hf_blocklocal.anatomy.layers import is_encoder_decoder
from hf_blocklocal.anatomy.modes import evaluation_mode
from hf_blocklocal.borrowing.copies import Copies
from hf_blocklocal.borrowing.loans import Loan
from hf_blocklocal.borrowing.shortcut import Shortcut
from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.cut.blocks import Boundaries, Cut
from hf_blocklocal.cut.inlets import Inlets
from hf_blocklocal.cut.trace import Trace
from hf_blocklocal.errors import UnsupportedSettingError
from hf_blocklocal.feedback import FeedbackHead, build_head
from hf_blocklocal.targets.batch import choose_alignment
from hf_blocklocal.teaching.chunked import ChunkedLoss
from hf_blocklocal.teaching.denoising import Denoising
from hf_blocklocal.teaching.replay import Replay


logger = logging.getLogger(__name__)

_COARSE = (torch.bfloat16, torch.float16)
_FINE_ENOUGH = 0.5


def build_heads(
    model: nn.Module, config: BlockLocalConfig, trace: Trace, cut: Cut, label_smoothing: float
) -> list[FeedbackHead]:
    """Return the head of every block but the last, in forward order."""
    blocks = range(cut.num_blocks - 1)
    heads: dict[int, FeedbackHead] = {}
    # A chain is made from above, where each network finds the one that it listens to.
    for block in reversed(blocks) if config.feedback == "chained" else blocks:
        layer = cut.spans[block].last
        # A head that borrows layers answers where the model's own does.
        answers = len(cut.layers) - 1 if config.borrows else layer
        final_stack = trace.ends_in_final_stack(answers)
        heads[block] = build_head(
            config,
            trace.task,
            hidden_width=_width(trace.shapes[layer]),
            alignment=choose_alignment(trace.task, trace.shapes[answers], trace.labels_shape, final_stack=final_stack),
            embedding_width=target_embedding(model).shape[1] if trace.task.target == "vocabulary" else None,
            entering_width=_entering_width(model, trace, cut, block) if config.reconstruction > 0 else None,
            label_smoothing=label_smoothing,
            above=heads[block + 1].feedback if block + 1 in heads else None,
        )
    return [heads[block] for block in blocks]


def can_lend(model: nn.Module, trace: Trace) -> bool:
    """Tell whether heads can borrow some layers and leave others out.

    That takes layers that put out the shape that they are given, unlike the stages of a Swin or a ResNet, and one
    stack of them, or an encoder and a decoder with a state for each label.
    """
    if any(given and given != made for given, made in zip(trace.entering, trace.shapes, strict=True)):
        return False
    if trace.stacks[-1] == 0:
        return True
    has_state_for_each = not trace.task.per_position or trace.shapes[-1][:2] == trace.labels_shape
    return is_encoder_decoder(model) and has_state_for_each


def build_shortcut(
    model: nn.Module,
    config: BlockLocalConfig,
    trace: Trace,
    cut: Cut,
    inputs: Mapping[str, Any],
    reach: Sequence[set[str]],
    *,
    confines: bool | None = None,
) -> Shortcut:
    """Return the way from the end of each block to the model's logits.

    Args:
        model: The model.
        config: What its heads borrow.
        trace: What one batch has shown of it.
        cut: Where it is cut.
        inputs: That batch.
        reach: For each block, the names of the parameters that its own layers use.
        confines: Whether a language-model head may be confined to some tokens. Without, two runs find out, which takes
            tensors that hold values.

    Raises:
        UnsupportedSettingError: If the model cannot lend what is asked for.
    """
    if trace.stacks[-1] > 0 and not is_encoder_decoder(model):
        raise UnsupportedSettingError(
            f"head_layers needs a model with one stack of layers, or an encoder and a decoder. {type(model).__name__} "
            f"has {trace.stacks[-1] + 1} stacks, and its config does not say is_encoder_decoder. Use head_layers=0."
        )
    if config.head_layers == 0 and not trace.ends_in_final_stack(cut.spans[0].last):
        raise UnsupportedSettingError(
            f"Block 0 ends in the encoder of {type(model).__name__}, and with head_layers=0 no decoder layer reads "
            "what a lens makes of it. Use head_lens with head_layers=1 or more, or none of the two."
        )
    if confines is None:
        with evaluation_mode(model):
            confines = trace.task.target == "vocabulary" and can_be_confined(model, inputs)
    straight_through = config.head_bypass == "straight_through"
    shortcut = Shortcut(
        model, cut, trace, config.head_layers, reach, confines=confines, straight_through=straight_through
    )
    if straight_through:
        _check_can_be_passed(model, shortcut, trace, cut)
    else:
        _check_fit_together(model, shortcut, trace, cut)
    return shortcut


def _check_fit_together(model: nn.Module, shortcut: Shortcut, trace: Trace, cut: Cut) -> None:
    """Refuse heads in which a layer is given another shape than in the model, for want of those before it."""
    for block in range(cut.num_blocks - 1):
        end, above = cut.spans[block].last, len(cut.layers) - cut.spans[block].stop
        arriving, stack = trace.shapes[end], cut.stacks[end]
        for layer in shortcut.kept_layers(block):
            if cut.stacks[layer] != stack:
                stack = cut.stacks[layer]
                arriving = trace.entering[cut.stacks.index(stack)]
            given = trace.entering[layer]
            if given and arriving and given != arriving:
                raise UnsupportedSettingError(
                    f"The head of block {block} cannot leave out layers before {cut.layers[layer]} of "
                    f"{type(model).__name__}, which is given {given} in the model and would be given {arriving}. Use "
                    f"heads of their own (head_layers=0), or all layers above (head_layers={above})."
                )
            arriving = trace.shapes[layer]


def _check_can_be_passed(model: nn.Module, shortcut: Shortcut, trace: Trace, cut: Cut) -> None:
    """Refuse to send gradients straight past layers that put out another shape than they are given."""
    for block in range(cut.num_blocks - 1):
        for layer in range(cut.spans[block].stop, len(cut.layers)):
            given, made = trace.entering[layer], trace.shapes[layer]
            if layer not in shortcut.kept_layers(block) and given != made:
                raise UnsupportedSettingError(
                    "head_bypass='straight_through' needs layers that put out the shape that they are given, and "
                    f"{cut.layers[layer]} of {type(model).__name__} makes {made} of {given}. Use head_bypass='skip'."
                )


def lent_to_heads(
    model: nn.Module,
    shortcut: Shortcut | None,
    owners: Mapping[str, int],
    num_blocks: int,
    *,
    contrasts_tokens: bool,
) -> tuple[set[str], ...]:
    """Return, for each block but the last, the names of the parameters of later blocks that its head uses.

    Those are the ones that it borrows, or, over a vocabulary, the embedding of the targets.

    Args:
        model: The model.
        shortcut: The way through borrowed layers, if heads borrow any.
        owners: The block that owns each parameter.
        num_blocks: Blocks.
        contrasts_tokens: Whether heads of their own compare with messages made from the embedding of the targets.
    """
    if shortcut is not None:
        return tuple(shortcut.lent_weights(owners))
    embedding = target_embedding(model) if contrasts_tokens else None
    names = {name for name, parameter in model.named_parameters() if parameter is embedding}
    return tuple({name for name in names if owners[name] > block} for block in range(num_blocks - 1))


def build_copies(
    model: nn.Module, config: BlockLocalConfig, lent: Sequence[set[str]], shortcut: Shortcut | None
) -> Copies | None:
    """Return copies of what heads use of later blocks, where they are not to use it live.

    Raises:
        UnsupportedSettingError: If copies are asked for and there is nothing to copy.
    """
    every, lag, decay = config.head_refresh_steps, config.head_refresh_lag, config.head_refresh_decay
    if config.is_live and not config.blocks_apart:
        return None
    if not any(lent):
        if not config.is_live:
            fields = ("head_copies", "head_refresh_steps", "head_refresh_lag", "head_refresh_decay")
            asked = [f"{name}={value!r}" for name in fields if (value := getattr(config, name)) not in (None, "auto")]
            raise UnsupportedSettingError(
                f"{', '.join(asked)}: this is about copies of what heads use of later blocks, and the heads of "
                f"{type(model).__name__} use nothing, with head_layers={config.head_layers}. Leave it out."
            )
        return None
    if every > 0:
        warn_of_coarse_averages(model, lent, decay)
    of_all = config.block_parallel_size == 1
    if shortcut is None:
        return Copies(model, lent, every=every, lag=lag, decay=decay, of_all=of_all)
    learns = shortcut.taught_weights(lent) if config.head_copies == "trained" else ()
    shortcut.copies = Copies(model, lent, every=every, lag=lag, decay=decay, learns=learns, of_all=of_all)
    return shortcut.copies


def warn_of_coarse_averages(model: nn.Module, lent: Sequence[set[str]], decay: float) -> None:
    """Say where copies move by steps that their numbers are too coarse for."""
    names = set().union(*lent)
    copied = [p for name, p in model.named_parameters() if name in names and p.requires_grad]
    coarse = {str(parameter.dtype) for parameter in copied if parameter.dtype in _COARSE}
    if coarse and decay > _FINE_ENOUGH:
        logger.warning(
            "head_refresh_decay=%s moves copies by a small part of what has changed, and in %s much of that is "
            "rounded away: at 0.9 they can miss half of it, at 0.99 all. Keep the weights in float32, "
            "with bf16=True for mixed precision, or use a decay of at most %s.",
            decay,
            " and ".join(sorted(coarse)),
            _FINE_ENOUGH,
        )


def lend_to_train_(heads: Sequence[FeedbackHead], copies: Copies) -> None:
    """Give every head the copies that it is to train."""
    for head, learning in zip(heads, copies.learning, strict=True):
        head.loan = Loan(learning) if learning else None


def build_chunked(model: nn.Module, config: BlockLocalConfig, inputs: Mapping[str, Any]) -> ChunkedLoss | None:
    """Return what computes the model's own loss in chunks, if the config asks for it.

    Raises:
        UnsupportedSettingError: If the loss of the model cannot be computed so.
    """
    if config.chunked_loss is None:
        return None
    chunked = ChunkedLoss(model, config.chunked_loss)
    chunked.check(inputs)
    return chunked


def build_denoising(
    model: nn.Module,
    config: BlockLocalConfig,
    trace: Trace,
    boundaries: Boundaries,
    inlets: Inlets,
    reach: Sequence[set[str]],
) -> Denoising:
    """Return the term that runs blocks a second time.

    Args:
        model: The model.
        config: The weight of the term.
        trace: What one batch has shown of it.
        boundaries: Its cut.
        inlets: Notes of what enters the blocks.
        reach: For each block, the names of the parameters that its own layers use.

    Raises:
        UnsupportedSettingError: If the blocks of the model have no single input to add noise to.
    """
    if trace.stacks[-1] > 0:
        raise UnsupportedSettingError(
            f"denoising needs a model with one stack of layers, and {type(model).__name__} has "
            f"{trace.stacks[-1] + 1}: what enters the decoder has two parts. Use denoising=0."
        )
    for span in boundaries.cut.spans[:-1]:
        if not trace.entering[span.start]:
            raise UnsupportedSettingError(
                f"denoising needs the hidden state that a layer is given, and {boundaries.cut.layers[span.start]} of "
                f"{type(model).__name__} is given none as its first argument or under that name. Use denoising=0."
            )
    replay = Replay(model, boundaries, inlets, forms=trace.forms, reached=reach)
    return Denoising(replay, config.denoising)


def _entering_width(model: nn.Module, trace: Trace, cut: Cut, block: int) -> int:
    """Return the width of what a block is given, where its output has the same positions."""
    span = cut.spans[block]
    given, returned = trace.entering[span.start], trace.shapes[span.last]
    if trace.stacks[span.start] != trace.stacks[span.last] or _positions(given) != _positions(returned):
        raise UnsupportedSettingError(
            f"reconstruction reads the input of a block from its output position by position, and block {block} "
            f"(layers {span.start} to {span.last}) of {type(model).__name__} is given {given} and returns {returned}, "
            f"from stack {trace.stacks[span.start]} to {trace.stacks[span.last]}. Use reconstruction=0, or boundaries "
            "where lengths or stacks change."
        )
    return _width(given)


def _positions(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], *shape[2:]) if len(shape) == 4 else shape[:-1]


def _width(shape: tuple[int, ...]) -> int:
    return shape[1] if len(shape) == 4 else shape[-1]
