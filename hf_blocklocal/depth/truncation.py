"""Make a smaller model of one that was trained block by block: its first blocks, and a standard task head.

Every block has a head that predicts, so one training run yields as many usable models as there are blocks. A head that
borrows layers is itself the model, shortened: the smaller model holds the same layers and says the same, to the bit. A
head of a block's own is written as the architecture's task head where that has the same form, and else the
architecture's own is fitted to the output of the block.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_blocklocal.anatomy.modes import evaluation_mode
from hf_blocklocal.borrowing.shortcut import borrowed_layers
from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.depth.calibration import fit_, on_device
from hf_blocklocal.depth.expression import express_, input_embedding, last_layer_of, parameters_behind_layers
from hf_blocklocal.depth.opening import Opened, Source, open_trained
from hf_blocklocal.depth.shrinking import Kept, kept_of, with_layers
from hf_blocklocal.errors import TruncationError
from hf_blocklocal.feedback import FeedbackHead
from hf_blocklocal.targets.spans import SpanTargets, answer_logits


logger = logging.getLogger(__name__)

# What a tokenizer or a processor leaves in a folder, beside the model.
COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# Share of the largest logit by which two ways to compute the same may differ.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
COARSE = 5e-2


@dataclass(frozen=True)
class Fit:
    """How a task head is fitted: on which batches with labels, for how many steps, from which learning rate."""

    batches: Iterable[Mapping[str, Any]]
    steps: int = 100
    learning_rate: float = 5e-3

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.learning_rate > 0:
            raise TruncationError(f"steps={self.steps} and learning_rate={self.learning_rate} must be above 0.")


def truncate(
    source: Source,
    num_blocks: int,
    *,
    output: str | os.PathLike[str] | None = None,
    config: BlockLocalConfig | None = None,
    heads: str | os.PathLike[str] | None = None,
    inputs: Mapping[str, Any] | None = None,
    keep_borrowed: bool = True,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    steps: int = 100,
    learning_rate: float = 5e-3,
) -> PreTrainedModel:
    """Return an ordinary, smaller transformers model: the first blocks and a standard task head.

    Where the head of the last block that is kept borrows layers, the model holds these too, and its logits are the
    head's. A head of a block's own is written as the architecture's task head where that has the same form. Else, or
    without the borrowed layers, the architecture's own, as it was trained at the end of the whole model, is fitted to
    the last block that is kept: `steps` steps of AdamW on the batches of `calibration`, all below it standing still.

    Args:
        source: A folder that a `BlockLocalTrainer` has saved; a model; or `trainer.assembly`.
        num_blocks: Blocks to keep. All of them give the model itself.
        output: Folder to save the smaller model in, with the tokenizer of the folder that the model comes from.
        config: How a model in memory was cut and taught.
        heads: Folder with the heads of a model in memory, if they have parameters.
        inputs: A small batch with labels, to compare the smaller model with the head; made up where that can be done.
        keep_borrowed: Whether layers that a head borrows are kept. Without them the model is smaller, and says what
            no head has said yet.
        calibration: Batches with labels, such as a `DataLoader`.
        steps: Steps of a calibration.
        learning_rate: Its first learning rate, which falls to 0.

    Raises:
        TruncationError: If there are not so many blocks, or no config of this architecture describes what is left, or
            a head would have to be fitted and there is no data.
        BlockLocalError: If the trained model cannot be opened; the subclass and the text say how.
    """
    opened = open_trained(source, config=config, heads=heads, inputs=inputs)
    fit = None if calibration is None else Fit(calibration, steps, learning_rate)
    small, how = shortened(opened, num_blocks, keep_borrowed=keep_borrowed, fit=fit)
    if keep_borrowed and num_blocks <= opened.assembly.last:
        opened.warn_of_heads("Smaller models", [num_blocks - 1])
    logger.info("%d of %d blocks of %s: %s", num_blocks, opened.assembly.last + 1, type(small).__name__, how)
    if output is not None:
        save(small, output, companions_of=opened.folder)
    return small


def layers_kept(opened: Opened, num_blocks: int, *, keep_borrowed: bool = True) -> tuple[int, ...]:
    """Return the layers of a smaller model, as indices in the order of execution."""
    cut, block = opened.assembly.cut, num_blocks - 1
    own = tuple(range(cut.spans[block].stop))
    if block == opened.assembly.last or not keep_borrowed or not opened.assembly.heads[block].borrows:
        return own
    return own + borrowed_layers(cut, block, opened.assembly.config.head_layers)


def shortened(
    opened: Opened, num_blocks: int, *, keep_borrowed: bool = True, fit: Fit | None = None
) -> tuple[PreTrainedModel, str]:
    """Return the smaller model, and in words how it came by its head; arguments and errors as for `truncate`."""
    assembly, model = opened.assembly, opened.model
    all_blocks = assembly.last + 1
    if isinstance(num_blocks, bool) or not isinstance(num_blocks, int) or not 1 <= num_blocks <= all_blocks:
        raise TruncationError(
            f"num_blocks={num_blocks!r} cannot be kept of the {all_blocks} blocks of this {type(model).__name__}. "
            f"Choose a whole number from 1 to {all_blocks}."
        )
    if num_blocks == all_blocks:
        return model, "the model itself"
    layers = layers_kept(opened, num_blocks, keep_borrowed=keep_borrowed)
    kept, head = kept_of(assembly.cut, layers), assembly.heads[num_blocks - 1]
    if head.borrows and head.lens is None and keep_borrowed:
        small = with_layers(model, kept)
        _check_same(small, opened, num_blocks - 1)
        return small, f"layers {', '.join(map(str, layers))}, of its blocks and as its head borrows them"
    last = last_layer_of(assembly.cut, len(kept[-1].indices))
    if not head.borrows:
        targets = assembly.read_targets(opened.inputs, whole_vocabulary=True)
        small = with_layers(model, kept)
        written = express_(small, head, targets, parameters_behind_layers(small, last, opened.inputs))
        if written and _distance(small, opened, num_blocks - 1) <= _tolerance(small):
            return small, "its head, written as the task head of the architecture"
    if fit is None:
        raise TruncationError(
            f"The head of block {num_blocks - 1} ({_kind_of(head)}) has no counterpart behind the last layer of this "
            f"{type(model).__name__}, whose own task head has to be fitted in its place. Pass batches with labels: "
            "truncate(..., calibration=dataloader)."
        )
    small = _untied(opened, kept, last)
    behind = parameters_behind_layers(small, last, opened.inputs)
    first, final = fit_(small, behind.values(), fit.batches, steps=fit.steps, learning_rate=fit.learning_rate)
    return small, f"its task head fitted in {fit.steps} steps, loss from {first:.3f} to {final:.3f}"


def _kind_of(head: FeedbackHead) -> str:
    if head.borrows:
        return "a lens" if head.lens is not None else "borrowed layers, which are not to be kept"
    return f"{type(head.feedback).__name__}, {type(head.readout).__name__}, {head.extra_repr()}"


def _untied(opened: Opened, kept: Sequence[Kept], last: str) -> PreTrainedModel:
    """Return the smaller model with the task head of the whole one, in weights that nothing else uses."""
    model = opened.model
    small = with_layers(model, kept)
    embedding = input_embedding(small)
    behind = parameters_behind_layers(small, last, opened.inputs)
    if not any(parameter is embedding for parameter in behind.values()):
        return small
    untied = with_layers(model, kept, tied=False)
    same = _share(_logits(untied, opened.inputs), _logits(small, opened.inputs)) <= _tolerance(small)
    if not same or untied.get_output_embeddings().weight is input_embedding(untied):
        raise TruncationError(
            f"The language-model head of {type(model).__name__} is its input embedding and cannot be fitted apart "
            "from it. Train with head_layers=1 or more, whose heads need no calibration."
        )
    return untied


def _check_same(small: PreTrainedModel, opened: Opened, block: int) -> None:
    distance = _distance(small, opened, block)
    if not distance <= _tolerance(small):
        raise TruncationError(
            f"{type(small).__name__} with fewer layers does not say what the head of block {block} says: logits "
            f"differ by {distance:.1%} of the largest. Its layers depend on their place in the model in a way that "
            "its config cannot express."
        )


def _tolerance(model: PreTrainedModel) -> float:
    return TOLERANCE.get(model.dtype, COARSE)


def _distance(small: PreTrainedModel, opened: Opened, block: int) -> float:
    """Return how far a smaller model is from the head of a block, as a share of the largest logit."""
    expected = opened.head_logits(block)
    logits = _logits(small, opened.inputs)
    if logits.shape != expected.shape:  # the rows that a head of a block's own answers
        targets = opened.assembly.read_targets(opened.inputs)
        if isinstance(targets, SpanTargets):
            logits = targets.answers(logits, None)
        else:
            rows_N = targets.samples_N if targets.positions_N is None else targets.positions_N
            logits = (logits if targets.positions_N is None else logits.flatten(0, 1))[rows_N]
    return _share(logits, expected)


def _share(logits: Tensor, expected: Tensor) -> float:
    if logits.shape != expected.shape:
        return float("inf")
    difference = (logits.float() - expected.float()).abs().max()
    return (difference / expected.float().abs().max().clamp(min=1e-12)).item()


@torch.no_grad()
def _logits(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    with evaluation_mode(model):
        return answer_logits(model(**on_device(inputs, model.device)))


def save(model: PreTrainedModel, output: str | os.PathLike[str], *, companions_of: Path | None = None) -> None:
    """Write a model into a folder, and the tokenizer of another folder beside it."""
    target = Path(output)
    if companions_of is not None and target.resolve() == companions_of.resolve():
        raise TruncationError(
            f"output={target} is the folder of the whole model, which would be lost. Choose another."
        )
    model.save_pretrained(target)
    for name in COMPANIONS if companions_of is not None else ():
        if (companions_of / name).is_file():
            shutil.copy(companions_of / name, target / name)
