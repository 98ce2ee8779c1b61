"""Read from a batch what all of its heads are to be taught, negatives included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_blocklocal.feedback import FeedbackHead
from hf_blocklocal.losses import Contrast
from hf_blocklocal.randomness import mixed
from hf_blocklocal.targets.batch import Targets, Task, read_targets
from hf_blocklocal.targets.sampling import with_candidates
from hf_blocklocal.targets.spans import read_spans


def contrasts_tokens(task: Task, heads: Iterable[FeedbackHead]) -> bool:
    """Tell whether heads compare their targets with other tokens of a vocabulary."""
    return task.target == "vocabulary" and any(isinstance(head.loss, Contrast) for head in heads)


def targets_for(
    task: Task,
    inputs: Mapping[str, Any],
    embedding_VE: Tensor | None,
    *,
    negatives: int | None,
    seed: tuple[int, ...] = (0,),
) -> Targets:
    """Return the targets of a batch, with candidates where heads contrast tokens.

    Args:
        task: What the labels mean.
        inputs: The model's inputs with labels.
        embedding_VE: The embedding of target tokens where heads contrast them, else None.
        negatives: Negatives to draw, None for the whole vocabulary.
        seed: What they are drawn from.
    """
    targets = read_spans(inputs) if task.target == "spans" else read_targets(task, inputs)
    if embedding_VE is None:
        return targets
    generator = torch.Generator().manual_seed(mixed(seed))
    return with_candidates(targets, embedding_VE, negatives=negatives, generator=generator)
