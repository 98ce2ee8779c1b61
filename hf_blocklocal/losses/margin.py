"""Tell which targets a block predicts well enough already, so that they need not teach it any more."""

# Shapes: N targets, C classes or candidates.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_blocklocal.targets.batch import Targets


@torch.no_grad()
def satisfied(logits_NC: Tensor, targets: Targets, margin: float) -> Tensor:
    """Tell for each target, (N,), whether its probability exceeds the margin.

    Args:
        logits_NC: What a block predicts, in the form of the model's own logits.
        targets: The targets: classes, tokens, or several labels, of which the probability is that of all together.
        margin: Probability from which on a target is satisfied.
    """
    if targets.task.target == "multi_label":
        labels = targets.values.float()
        log_p_N = -F.binary_cross_entropy_with_logits(logits_NC.float(), labels, reduction="none").sum(-1)
    else:
        candidates = targets.candidates
        log_weights_C = 0.0 if candidates is None else candidates.log_weights_C
        log_p_NC = (logits_NC.float() + log_weights_C).log_softmax(-1)
        log_p_N = log_p_NC.gather(1, targets.values.unsqueeze(1)).squeeze(1)
    return log_p_N.exp() > margin
