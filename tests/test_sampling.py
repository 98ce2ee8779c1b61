"""The candidates of a contrast hold every target, and estimate the whole vocabulary without bias."""

# Shapes: V vocabulary, C candidates, M negatives, E embedding width.

from __future__ import annotations

import math

import pytest
import torch

from hf_blocklocal.targets.batch import Targets, Task
from hf_blocklocal.targets.sampling import skip_ids, with_candidates


V, E = 12, 3
TASK = Task("vocabulary", V, per_position=True)
IDS_N = torch.tensor([7, 2, 7, 11, 0, 2])
# The row of token v begins with v, so that a candidate can be told by its embedding.
EMBEDDING_VE = torch.arange(V).float()[:, None].repeat(1, E)


def sampled(negatives, *, seed=0, ids_N=IDS_N, embedding_VE=EMBEDDING_VE):
    targets = Targets(TASK, ids_N, torch.zeros_like(ids_N))
    generator = torch.Generator().manual_seed(seed)
    return with_candidates(targets, embedding_VE, negatives=negatives, generator=generator)


def tokens(targets):
    """Return the token id of every candidate."""
    return targets.candidates.embeddings_CE[:, 0].long()


@pytest.mark.parametrize(
    "left_out", [[], [0], [V - 1], [0, 1, 2], [3, 4, 9], [0, 5, 6, 11], list(range(11)), list(range(1, V))]
)
def test_ranks_are_counted_among_the_ids_that_remain(left_out):
    remaining = [token for token in range(V) if token not in left_out]
    found = skip_ids(torch.tensor(left_out, dtype=torch.long), torch.arange(len(remaining)))
    assert found.tolist() == remaining


def test_ranks_may_repeat_and_come_in_any_order():
    assert skip_ids(torch.tensor([1, 2]), torch.tensor([3, 0, 3, 1])).tolist() == [5, 0, 5, 3]


@pytest.mark.parametrize("negatives", [1, 3, 7, 8, 100, None])
def test_every_target_is_among_the_candidates(negatives):
    targets = sampled(negatives)
    assert torch.equal(tokens(targets)[targets.values], IDS_N)


@pytest.mark.parametrize("negatives", [1, 3, 7])
def test_no_negative_is_a_target(negatives):
    targets = sampled(negatives)
    distinct = len(set(IDS_N.tolist()))
    assert sorted(tokens(targets)[:distinct].tolist()) == sorted(set(IDS_N.tolist()))
    assert len(tokens(targets)[distinct:]) == negatives
    assert not set(tokens(targets)[distinct:].tolist()) & set(IDS_N.tolist())


def test_targets_count_once_and_negatives_for_all_the_tokens_they_stand_for():
    log_weights_C = sampled(2).candidates.log_weights_C
    assert torch.equal(log_weights_C[:4], torch.zeros(4))
    torch.testing.assert_close(log_weights_C[4:], torch.full((2,), math.log(8 / 2)))


def test_the_estimate_of_the_partition_function_is_unbiased():
    score_V = torch.randn(V, generator=torch.Generator().manual_seed(1))
    estimates = []
    for seed in range(1500):
        targets = sampled(3, seed=seed)
        candidates = targets.candidates
        estimates.append((score_V[tokens(targets)] + candidates.log_weights_C).exp().sum())
    estimates = torch.stack(estimates).double()
    standard_error = estimates.std() / math.sqrt(len(estimates))
    # Tight enough to tell: without the weights the estimate would be far away.
    assert standard_error < 0.02 * score_V.exp().sum()
    assert (estimates.mean() - score_V.exp().sum()).abs() < 3.5 * standard_error


@pytest.mark.parametrize("negatives", [8, 9, 1000, None])
def test_negatives_enough_for_all_make_the_partition_function_exact(negatives):
    targets = sampled(negatives)
    candidates = targets.candidates
    assert torch.equal(candidates.embeddings_CE, EMBEDDING_VE)
    assert torch.equal(candidates.log_weights_C, torch.zeros(V))
    assert candidates.vocabulary == V


def test_equal_seeds_draw_equal_candidates_and_others_draw_others():
    first, again, other = sampled(5, seed=3), sampled(5, seed=3), sampled(5, seed=4)
    assert torch.equal(tokens(first), tokens(again))
    assert torch.equal(first.values, again.values)
    assert not torch.equal(tokens(first), tokens(other))


def test_the_global_random_stream_is_left_alone():
    before = torch.get_rng_state()
    sampled(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_gradient_flows_into_the_embedding():
    embedding_VE = EMBEDDING_VE.clone().requires_grad_()
    for negatives in (2, None):
        assert not sampled(negatives, embedding_VE=embedding_VE).candidates.embeddings_CE.requires_grad


def test_without_targets_there_are_only_negatives():
    targets = sampled(3, ids_N=torch.zeros(0, dtype=torch.long))
    assert len(targets) == 0
    assert len(tokens(targets)) == 3
    torch.testing.assert_close(targets.candidates.log_weights_C, torch.full((3,), math.log(V / 3)))
