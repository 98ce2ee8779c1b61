"""What each block's head would have predicted, sample by sample.

Numbers are kept per sample, so that whoever gathers them over processes can leave out samples that were only there to
fill a batch.
"""

# Shapes: B batch, N targets, K blocks, V vocabulary.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_blocklocal.anatomy.modes import outputs_not_recorded
from hf_blocklocal.losses import LocalLoss, Messages
from hf_blocklocal.targets.batch import Targets, labels_of
from hf_blocklocal.teaching.step import LocalStep


# Rows of scores over a whole vocabulary that are held at a time.
_CHUNK = 512


class BlockScores:
    """Collects how well every block but the last predicts, over one evaluation.

    Args:
        step: The local step whose heads are to be scored.
    """

    def __init__(self, step: LocalStep) -> None:
        self.step = step
        self.batch_BK3: Tensor | None = None
        self._sums_K3: Tensor | None = None
        self._has_hits = True

    @contextmanager
    def watch(self, targets: Targets, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Score the heads in the forward pass that runs inside the `with`; `batch_BK3` holds the result.

        Args:
            targets: Targets of the batch; over a vocabulary, with the whole of it as candidates.
            inputs: The model's inputs with labels.
        """
        self._has_hits = targets.task.target != "regression"
        heads, batch_size = self.step.heads, labels_of(inputs).shape[0]
        scores: dict[int, Tensor] = {}

        def leave(block: int, hidden: Tensor, _router_logits: tuple[Tensor, ...]) -> None:
            with outputs_not_recorded(), self.step.borrowing(block):
                seen = self.step.seen_by_head(block, hidden, inputs, targets, shortened=True)
            messages = heads[block].messages(seen, self.step.bring(block, targets))
            scores[block] = score(heads[block].loss, messages)

        with self.step.boundaries.attached(leave):
            yield
        # Only now, so that no block waits for the numbers of another one.
        columns_BK3 = torch.zeros(batch_size, len(heads), 3, device=targets.values.device)
        for block, scores_N3 in scores.items():
            scores_N3 = scores_N3.to(columns_BK3.device)
            columns_BK3[:, block] = columns_BK3[:, block].index_add(0, targets.samples_N, scores_N3)
        self.batch_BK3 = columns_BK3

    def add(self, gathered_BK3: Tensor) -> None:
        """Add the scores of samples to the sums."""
        sums_K3 = gathered_BK3.double().sum(0)
        self._sums_K3 = sums_K3 if self._sums_K3 is None else self._sums_K3 + sums_K3

    def gather(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Add up what processes with different blocks have found; each knows nothing of the others' blocks."""
        if self._sums_K3 is not None:
            self._sums_K3 = add_up(self._sums_K3)

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return `{prefix}_block_k_loss` and, where there is a right or wrong, `{prefix}_block_k_accuracy`."""
        metrics: dict[str, float] = {}
        for block, (loss, hits, count) in enumerate(() if self._sums_K3 is None else self._sums_K3.tolist()):
            if count > 0:
                metrics[f"{prefix}_block_{block}_loss"] = loss / count
                if self._has_hits:
                    metrics[f"{prefix}_block_{block}_accuracy"] = hits / count
        return metrics


def score(loss: LocalLoss, messages: Messages) -> Tensor:
    """Return loss, hits and count of elements for each target, (N, 3).

    A regression has no hits, and the squared error as its loss, to be compared with that of the whole model.
    """
    rows = []
    values = messages.targets.values
    for start in range(0, len(values), _CHUNK):
        part = slice(start, start + _CHUNK)
        targets = replace(messages.targets, values=values[part])
        chunk = Messages(messages.forward_NZ[part], messages.backward_CZ, targets)
        logits_NC = loss.logits(chunk)
        loss_N = _loss(loss, logits_NC, targets)
        hits_N, per_target = _hits(logits_NC, targets)
        rows.append(torch.stack([loss_N.float(), hits_N, torch.full_like(hits_N, per_target)], dim=1))
    return torch.cat(rows) if rows else values.new_zeros((0, 3), dtype=torch.float32)


def _loss(loss: LocalLoss, logits_NC: Tensor, targets: Targets) -> Tensor:
    if targets.task.target == "regression":  # as the model's own loss: the agreement of the head's is a quarter of it
        return (logits_NC.float() - targets.values.float()).square().sum(-1)
    return loss.of_logits(logits_NC, targets)


def _hits(logits: Tensor, targets: Targets) -> tuple[Tensor, float]:
    kind = targets.task.target
    if kind == "regression":
        return logits.new_zeros(len(targets)), float(logits.shape[1])
    if kind == "multi_label":
        return ((logits > 0) == (targets.values > 0.5)).sum(1).float(), float(logits.shape[1])
    return (logits.argmax(-1) == targets.values).float(), 1.0
