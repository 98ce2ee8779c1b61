"""Similarity matching is what its paper says, written down here a second time."""

# Shapes: B batch, S sequence, D hidden width, N targets, C classes, M labels.

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from hf_blocklocal import BlockLocalConfig
from hf_blocklocal.config.presets import PRESETS
from hf_blocklocal.errors import TargetError
from hf_blocklocal.feedback import build_head
from hf_blocklocal.losses import SimilarityMatching
from hf_blocklocal.targets.batch import Task, read_targets


B, S, D, C = 6, 3, 5, 4
CLASSES = Task("classes", C)
TAGS = Task("classes", C, per_position=True)
LABELS = Task("multi_label", C)
TASKS = {"classes": CLASSES, "tags": TAGS, "labels": LABELS}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def targets_of(task):
    generator = torch.Generator().manual_seed(0)
    if task.target == "multi_label":
        return read_targets(task, {"labels": torch.randint(2, (B, C), generator=generator).float()})
    labels = torch.randint(C, (B, S) if task.per_position else (B,), generator=generator)
    labels.view(-1)[1] = -100
    return read_targets(task, {"labels": labels})


def head_of(task, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_head(
            BlockLocalConfig(**options),
            task,
            hidden_width=D,
            alignment="position" if task.per_position else "pooled",
        )


def rows_of(hidden, targets):
    return (
        hidden.mean(1)[targets.samples_N] if targets.positions_N is None else hidden.flatten(0, 1)[targets.positions_N]
    )


def vectors_of(targets):
    return targets.values if targets.task.target == "multi_label" else F.one_hot(targets.values, C).float()


def reference_similarity(vectors):
    """Return all Pearson correlations between vectors, one pair at a time."""
    return torch.stack([torch.stack([_pearson(one, other) for other in vectors]) for one in vectors])


def _pearson(one, other):
    one, other = one - one.mean(), other - other.mean()
    lengths = (one @ one).sqrt() * (other @ other).sqrt()
    return one @ other / lengths if lengths > 0 else lengths


def reference_sim(head, hidden, targets):
    mapped = rows_of(hidden, targets) @ head.similarity.map.weight.T
    return (reference_similarity(mapped) - reference_similarity(vectors_of(targets))).square().mean()


def reference_pred(head, hidden, targets):
    logits = head.readout(rows_of(hidden, targets))
    if targets.task.target == "multi_label":
        return F.binary_cross_entropy_with_logits(logits, targets.values)
    return F.cross_entropy(logits, targets.values)


def gradients(loss, head, hidden):
    return torch.autograd.grad(loss, [hidden, *head.parameters()])


@pytest.mark.parametrize("name", TASKS)
def test_the_preset_predsim_weighs_prediction_and_similarity(name):
    head, targets = head_of(TASKS[name], **PRESETS["predsim"]), targets_of(TASKS[name])
    hidden = normal(B, S, D).requires_grad_()
    expected = 0.01 * reference_pred(head, hidden, targets) + 0.99 * reference_sim(head, hidden, targets)
    found = head(hidden, targets).sum() / targets.elements
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, head, hidden), gradients(expected, head, hidden))


@pytest.mark.parametrize("name", TASKS)
def test_the_preset_sim_teaches_the_block_by_similarity_and_the_readout_beside_it(name):
    head, targets = head_of(TASKS[name], **PRESETS["sim"]), targets_of(TASKS[name])
    hidden = normal(B, S, D).requires_grad_()
    expected = reference_pred(head, hidden.detach(), targets) + reference_sim(head, hidden, targets)
    found = head(hidden, targets).sum() / targets.elements
    torch.testing.assert_close(gradients(found, head, hidden), gradients(expected, head, hidden))
    of_similarity = torch.autograd.grad(reference_sim(head, hidden, targets), hidden)
    of_head = torch.autograd.grad(head(hidden, targets).sum() / targets.elements, hidden)
    torch.testing.assert_close(of_head, of_similarity)


def test_direct_feedback_goes_with_similarity_too():
    head, plain, targets = head_of(CLASSES, sim=0.3), head_of(CLASSES, head_layers=0), targets_of(CLASSES)
    plain.load_state_dict({key: value for key, value in head.state_dict().items() if "similarity" not in key})
    hidden = normal(B, S, D)
    expected = 0.7 * plain(hidden, targets).mean() + 0.3 * reference_sim(head, hidden, targets)
    torch.testing.assert_close(head(hidden, targets).mean(), expected)


def test_without_similarity_a_head_has_no_map():
    assert head_of(CLASSES, **PRESETS["pred"]).similarity is None


def test_rows_that_are_as_alike_as_their_targets_cost_nothing():
    targets, similarity = targets_of(CLASSES), SimilarityMatching(C)
    with torch.no_grad():
        similarity.map.weight.copy_(torch.eye(C))
    rows_ND = 3 + 2 * F.one_hot(targets.values, C).float()
    torch.testing.assert_close(similarity(rows_ND, targets), torch.tensor(0.0))


def test_of_many_targets_512_are_compared_evenly_spaced():
    labels = torch.randint(C, (1024,), generator=torch.Generator().manual_seed(0))
    every, rows_ND = read_targets(CLASSES, {"labels": labels}), normal(1024, D)
    second = replace(every, values=every.values[::2], samples_N=every.samples_N[::2])
    similarity = SimilarityMatching(D)
    torch.testing.assert_close(similarity(rows_ND, every), similarity(rows_ND[::2], second))


def test_a_batch_without_targets_gives_no_gradient_that_is_not_a_number():
    head = head_of(CLASSES, **PRESETS["predsim"])
    head(normal(2, S, D), read_targets(CLASSES, {"labels": torch.full((2,), -100)})).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


@pytest.mark.parametrize("preset", ["sim", "predsim"])
@pytest.mark.parametrize("task", [Task("regression", 2), Task("multi_label", 1)])
def test_targets_that_have_no_similarities_are_refused(preset, task):
    sim = PRESETS[preset]["sim"]
    with pytest.raises(TargetError) as error:
        head_of(task, **PRESETS[preset])
    assert str(error.value) == (
        f"sim={sim} compares one-hot targets with each other, which {task.target!r} targets of size {task.size} are "
        "not. Leave it out, or use the preset 'pred'."
    )
