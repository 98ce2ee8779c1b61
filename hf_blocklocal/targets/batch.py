"""What a batch asks of the model, and which rows of a hidden state have to answer.

Turns labels of any of the usual shapes into one flat list of targets, so that heads and losses never see padding,
`-100`, shifted labels or the difference between an encoder and a decoder.
"""

# Shapes: B batch, S sequence, D hidden width, C classes or vocabulary, M outputs per sample, N targets that count,
# R rows that a readout looks at, E embedding width of a target token.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_blocklocal.errors import TargetError


IGNORED = -100

TargetKind = Literal["classes", "vocabulary", "multi_label", "regression", "spans"]
Alignment = Literal["pooled", "position"]
Pooling = Literal["mean", "first", "last"]


@dataclass(frozen=True)
class Task:
    """What is to be predicted.

    Attributes:
        target: Kind of one target.
        size: Classes, tokens of the vocabulary, labels or outputs to choose from; 2 for the start and end of a span.
        per_position: Whether every position of the sequence has its own target.
        shifted: Whether position i predicts the label at i + 1.
    """

    target: TargetKind
    size: int
    per_position: bool = False
    shifted: bool = False


@dataclass(frozen=True)
class Candidates:
    """The tokens that a contrast over a vocabulary runs over, shared by all blocks of a step.

    Attributes:
        embeddings_CE: Row of the model's own target embedding for each candidate, without gradient.
        log_weights_C: Logarithm of how many tokens each candidate stands for: 0 for the targets of the batch,
            `log((V - |T|) / M)` for the M negatives drawn among the other `V - |T|` tokens.
        vocabulary: Tokens in all, V.
        ids_C: The token of each candidate; None where they are the whole vocabulary in its order.
    """

    embeddings_CE: Tensor
    log_weights_C: Tensor
    vocabulary: int
    ids_C: Tensor | None = None


@dataclass(frozen=True)
class Targets:
    """The targets of one micro-batch that count, flat.

    Attributes:
        task: What they are targets of.
        values: (N,) class or candidate indices, or (N, M) floats.
        samples_N: Row of the batch that each target belongs to.
        positions_N: Place in the flattened (B * S) sequence whose hidden state predicts it, None without positions.
        mask_BS: Attention mask of the inputs, None if there is none.
        stretched: Whether the mask counts samples of sound, of which a hidden state stands for several.
        candidates: Candidates of a vocabulary, None for other tasks.
    """

    task: Task
    values: Tensor
    samples_N: Tensor
    positions_N: Tensor | None = None
    mask_BS: Tensor | None = None
    stretched: bool = False
    candidates: Candidates | None = None

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def elements(self) -> int:
        """Numbers to predict: N, times M where a target has several."""
        return self.values.numel()

    def rows(self, hidden: Tensor, alignment: Alignment, pooling: Pooling) -> tuple[Tensor, Tensor | None]:
        """Pick what a readout has to look at.

        Args:
            hidden: Output of a block, (B, S, D) or (B, D, height, width); or logits of whole samples, (B, C).
            alignment: One row per target position, or one pooled row per sample.
            pooling: How to pool.

        Returns:
            Rows (R, D), and for each target the index of its row (N,), or None where rows and targets are the same.
        """
        if alignment == "position":
            return hidden.flatten(0, 1)[self.positions_N], None
        if hidden.dim() == 2:
            return hidden, self.samples_N
        return pool(hidden, self._mask_for(hidden), pooling), self.samples_N

    def answers(self, read: Tensor, index_N: Tensor | None, *, as_model: bool = False) -> Tensor:
        """Return what was read for each target, (N, Z).

        Args:
            read: What a readout has made of each row that `rows` picked, (R, Z).
            index_N: For each target the index of its row, as `rows` has it.
            as_model: Whether this is what the model itself has said, to be compared as its own loss does.
        """
        return read if index_N is None else read[index_N]

    def mean_square(self, difference: Tensor) -> Tensor:
        """Return the mean square over units and positions; padding does not count.

        Args:
            difference: Of two hidden states, (B, S, D) or (B, D, height, width).
        """
        square = difference.float().square()
        mask_BS = self._mask_for(difference)
        if mask_BS is None or mask_BS.shape != difference.shape[:2]:
            return square.mean()
        weights_BS = mask_BS.to(square.dtype)
        return (square.mean(-1) * weights_BS).sum() / weights_BS.sum().clamp(min=1)

    def _mask_for(self, hidden: Tensor) -> Tensor | None:
        """Return the mask, with as many positions as the hidden state where it counts samples of sound."""
        if self.stretched and self.mask_BS is not None and hidden.dim() == 3:
            return F.interpolate(self.mask_BS[:, None].float(), size=hidden.shape[1], mode="nearest")[:, 0]
        return self.mask_BS

    def moved(self, hidden: Tensor, change_ND: Tensor, alignment: Alignment) -> Tensor:
        """Move each hidden state by what the targets it answers ask for.

        Args:
            hidden: Output of a block, (B, S, D) or (B, D, height, width).
            change_ND: For each target, the change of the row that `rows` picks for it.
            alignment: One row per target position, each moved by itself; or one per sample, whose whole sequence is
                moved by the mean over its targets, and its pooled row with it.
        """
        if alignment == "position":
            flat = hidden.flatten(0, 1)
            return flat.index_add(0, self.positions_N, change_ND.to(hidden.dtype)).view_as(hidden)
        counts_B = occurrences(self.samples_N, hidden.shape[0]).clamp(min=1)
        sums_BD = change_ND.new_zeros(hidden.shape[0], change_ND.shape[1]).index_add(0, self.samples_N, change_ND)
        change_BD = (sums_BD / counts_B.unsqueeze(1)).to(hidden.dtype)
        return hidden + (change_BD[:, :, None, None] if hidden.dim() == 4 else change_BD.unsqueeze(1))


def occurrences(values_N: Tensor, size: int) -> Tensor:
    """Return how often each of 0, ..., size - 1 occurs, without waiting for the device as `torch.bincount` does."""
    return values_N.new_zeros(size).index_add(0, values_N, torch.ones_like(values_N))


def by_position(hidden: Tensor) -> Tensor:
    """Return a hidden state position by position, (B, S, D), also where it is (B, D, height, width)."""
    return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden


def pool(hidden: Tensor, mask_BS: Tensor | None, pooling: Pooling) -> Tensor:
    """Reduce a sequence of hidden states to one row per sample; padding does not count.

    Args:
        hidden: (B, S, D), or (B, D, height, width) as convolutional nets have it.
        mask_BS: 1 where there is input, 0 where there is padding. Left aside if its length is not S.
        pooling: `"mean"` over the sequence, or its `"first"` or `"last"` state.

    Returns:
        (B, D).
    """
    hidden_BSD = by_position(hidden)
    if mask_BS is None or mask_BS.shape != hidden_BSD.shape[:2]:
        mask_BS = torch.ones(hidden_BSD.shape[:2], device=hidden.device)
    if pooling == "mean":
        weights_BS1 = mask_BS.to(hidden_BSD.dtype).unsqueeze(-1)
        return (hidden_BSD * weights_BS1).sum(1) / weights_BS1.sum(1).clamp(min=1)
    present_BS = mask_BS.to(torch.int32)
    index_B = present_BS.argmax(1) if pooling == "first" else mask_BS.shape[1] - 1 - present_BS.flip(1).argmax(1)
    return hidden_BSD[torch.arange(hidden_BSD.shape[0], device=hidden.device), index_B]


def describe_task(
    labels: Tensor, logits: Tensor, *, vocabulary: int | None, shifted: bool, problem_type: str | None
) -> Task:
    """Infer from the shapes of labels and logits what is to be predicted.

    Args:
        labels: The labels of a batch.
        logits: What the model makes of it, (B, C) or (B, S, C).
        vocabulary: Tokens that a language-model head chooses from, None without one.
        shifted: Whether position i predicts label i + 1.
        problem_type: `config.problem_type` of the model, if it has one.

    Raises:
        TargetError: If no feedback head fits.
    """
    size = logits.shape[-1]
    is_integer = not labels.is_floating_point() and labels.dtype != torch.bool
    if logits.dim() == 3 and is_integer and labels.shape == logits.shape[:2]:
        if size == vocabulary:
            return Task("vocabulary", size, per_position=True, shifted=shifted)
        return Task("classes", size, per_position=True)
    if logits.dim() == 2:
        if problem_type == "regression" or (problem_type is None and not is_integer and size == 1):
            return Task("regression", size)
        if is_integer and labels.shape in (logits.shape[:1], (logits.shape[0], 1)):
            return Task("classes", size)
        if not is_integer and labels.shape == logits.shape:
            return Task("multi_label", size)
    raise TargetError(
        f"No feedback head fits labels of shape {tuple(labels.shape)} ({labels.dtype}) for logits of shape "
        f"{tuple(logits.shape)}. There are heads for one class per sample (B,), one per position (B, S), float labels "
        "(B, C) and regression targets (B,) or (B, M)."
    )


def labels_of(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the labels of a batch; of spans, their starts and ends, (B, 2).

    Raises:
        TargetError: If there are none.
    """
    labels = inputs.get("labels")
    if labels is None and inputs.get("start_positions") is not None:
        if inputs.get("end_positions") is None:
            raise TargetError("The batch holds start_positions and no end_positions: a span has both. Add the column.")
        return torch.stack([inputs[name].reshape(-1) for name in ("start_positions", "end_positions")], dim=1)
    if labels is None:
        raise TargetError(
            f"The batch holds no 'labels', only {sorted(inputs)}: block-local learning needs the target at every "
            "block. Add a 'labels' column to the data set, or use a data collator that makes one."
        )
    return labels


def has_labels(inputs: Mapping[str, Any]) -> bool:
    """Tell whether a batch says what is to be predicted."""
    return inputs.get("labels") is not None or inputs.get("start_positions") is not None


def two_dimensional_mask(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Return the mask that tells input from padding, (B, S), if the batch has one."""
    mask = inputs.get("attention_mask")
    return mask if mask is not None and mask.dim() == 2 else None


def read_targets(task: Task, inputs: Mapping[str, Tensor]) -> Targets:
    """Flatten the labels of a batch to the targets that count.

    Args:
        task: What the labels mean.
        inputs: The model's inputs with `labels`, and with `shift_labels` where a collator has shifted them already.

    Returns:
        The targets, none at all if every label is -100. Vocabulary targets are still token ids, without candidates.
    """
    labels = labels_of(inputs)
    mask_BS = two_dimensional_mask(inputs)
    stretched = "input_values" in inputs or "input_features" in inputs
    if not task.per_position:
        samples_N = torch.arange(labels.shape[0], device=labels.device)
        if task.target == "classes":
            samples_N = samples_N[labels.flatten() != IGNORED]
            values = labels.flatten()[samples_N]
        else:
            values = labels.float().reshape(labels.shape[0], -1)
        return Targets(task, values, samples_N, mask_BS=mask_BS, stretched=stretched)
    if "shift_labels" in inputs:
        labels = inputs["shift_labels"]
    elif task.shifted:
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    positions_N = (labels.reshape(-1) != IGNORED).nonzero().squeeze(1)
    return Targets(
        task,
        labels.reshape(-1)[positions_N],
        samples_N=positions_N // labels.shape[1],
        positions_N=positions_N,
        mask_BS=mask_BS,
        stretched=stretched,
    )


def choose_alignment(
    task: Task, hidden_shape: tuple[int, ...], labels_shape: tuple[int, ...], *, final_stack: bool
) -> Alignment:
    """Choose what a block's readout looks at.

    Args:
        task: What is to be predicted.
        hidden_shape: Shape of the block's output.
        labels_shape: Shape of the labels of the same batch.
        final_stack: Whether the block ends in the model's last stack; the encoder of an encoder-decoder does not.

    Returns:
        `"position"` where hidden states and labels go together position by position, and where the positions are the
        answers. `"pooled"` for targets of whole samples, and for encoders, whose pooled state is taught by all target
        tokens of its sample.

    Raises:
        TargetError: If targets and hidden states have different lengths.
    """
    if hidden_shape[0] != labels_shape[0]:
        raise TargetError(
            f"The labels are for {labels_shape[0]} samples but a block puts out {tuple(hidden_shape)}: a head cannot "
            "tell which rows answer which target. Multiple choice, and models that put positions before samples, are "
            "not supported."
        )
    if not task.per_position or not (final_stack or task.target == "spans"):
        return "pooled"
    if tuple(hidden_shape[:2]) != tuple(labels_shape):
        raise TargetError(
            f"The labels have shape {tuple(labels_shape)} but a block puts out {tuple(hidden_shape)}: a target per "
            "position needs one hidden state per position. Methods that add tokens in front, and models with several "
            "states per position, are not supported."
        )
    return "position"
