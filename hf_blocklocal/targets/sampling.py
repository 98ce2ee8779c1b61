"""Candidates for a contrast over a vocabulary: the batch's own targets and shared negatives.

The partition function over V tokens is a sum over the distinct targets T of the batch, which all enter, and over the
other V - |T| tokens, of which M are drawn uniformly with replacement and each counts for (V - |T|) / M (Hansen and
Hurwitz 1943). The estimate is unbiased, and needs no count of how often a token occurs; where M reaches V - |T|, all
tokens enter and it is exact. It is a sampled softmax (Jean et al. 2015, arXiv 1412.2007).
"""

# Shapes: V vocabulary, T distinct targets, M negatives, C = T + M candidates, N targets, E embedding width.

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from hf_blocklocal.targets.batch import Candidates, Targets


def with_candidates(
    targets: Targets, embedding_VE: Tensor, *, negatives: int | None, generator: torch.Generator | None = None
) -> Targets:
    """Give vocabulary targets the candidates that their contrast runs over.

    Args:
        targets: Targets whose values are token ids.
        embedding_VE: The model's matrix of target embeddings.
        negatives: Negatives to draw, None for the whole vocabulary.
        generator: CPU generator to draw from, so that every block and every placement sees the same negatives.

    Returns:
        The same targets, their values now indices into the candidates.
    """
    vocabulary = embedding_VE.shape[0]
    distinct_T, values_N = targets.values.unique(return_inverse=True)
    others = vocabulary - distinct_T.shape[0]
    if negatives is None or negatives >= others:
        weights = torch.zeros(vocabulary, device=targets.values.device)
        return replace(targets, candidates=Candidates(embedding_VE.detach(), weights, vocabulary))
    ranks_M = torch.randint(others, (negatives,), generator=generator).to(distinct_T.device)
    ids_C = torch.cat([distinct_T, skip_ids(distinct_T, ranks_M)])
    log_weights_C = torch.zeros(ids_C.shape[0], device=ids_C.device)
    log_weights_C[distinct_T.shape[0] :] = math.log(others / negatives)
    candidates = Candidates(embedding_VE.detach()[ids_C], log_weights_C, vocabulary, ids_C)
    return replace(targets, values=values_N, candidates=candidates)


def skip_ids(sorted_T: Tensor, ranks_M: Tensor) -> Tensor:
    """Return the ids that stand at the given ranks when the given ids are left out of 0, 1, 2, ...

    Args:
        sorted_T: Ids to leave out, ascending and distinct.
        ranks_M: Ranks among the ids that remain.
    """
    remaining_below_T = sorted_T - torch.arange(sorted_T.shape[0], device=sorted_T.device)
    return ranks_M + torch.searchsorted(remaining_below_T, ranks_M, right=True)
