"""The local losses are the losses everybody knows, wherever they claim to be."""

# Shapes: N targets, C classes or candidates, Z units of the latent.

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from hf_blocklocal.losses import LOSSES, Agreement, Contrast, LocalLoss, Messages
from hf_blocklocal.losses.families import FAMILIES, get_family
from hf_blocklocal.targets.batch import Candidates, Targets, Task


N, C, Z = 6, 5, 4
CLASSES_N = torch.tensor([0, 4, 2, 2, 1, 3])
SMOOTHINGS = pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
FAMILY_NAMES = pytest.mark.parametrize("family", FAMILIES)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def class_targets(values_N=CLASSES_N, candidates=None):
    task = Task("classes" if candidates is None else "vocabulary", C)
    return Targets(task, values_N, torch.arange(len(values_N)), candidates=candidates)


def contrast_of(forward_NZ, backward_CZ, *, family="gaussian", smoothing=0.0, candidates=None):
    messages = Messages(forward_NZ, backward_CZ, class_targets(candidates=candidates))
    loss = Contrast(get_family(family), label_smoothing=smoothing)
    return loss(messages), loss.logits(messages)


# ---- Contrast ----


@FAMILY_NAMES
@SMOOTHINGS
def test_contrast_with_all_classes_is_cross_entropy_over_the_overlaps(family, smoothing):
    loss_N, scores_NC = contrast_of(normal(N, Z), normal(C, Z, seed=1), family=family, smoothing=smoothing)
    expected_N = F.cross_entropy(scores_NC, CLASSES_N, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(loss_N, expected_N)


@SMOOTHINGS
def test_contrast_with_all_tokens_as_candidates_is_the_same_as_with_classes(smoothing):
    forward_NZ, backward_CZ = normal(N, Z), normal(C, Z, seed=1)
    everyone = Candidates(torch.zeros(C, 2), torch.zeros(C), vocabulary=C)
    found_N, _ = contrast_of(forward_NZ, backward_CZ, smoothing=smoothing, candidates=everyone)
    expected_N, _ = contrast_of(forward_NZ, backward_CZ, smoothing=smoothing)
    torch.testing.assert_close(found_N, expected_N)


@SMOOTHINGS
def test_a_candidate_that_stands_for_three_tokens_counts_as_three_equal_ones(smoothing):
    forward_NZ, backward_CZ = normal(N, Z), normal(C, Z, seed=1)
    # Candidate 4 is nobody's target here and stands for itself and two more.
    values_N = torch.tensor([0, 3, 2, 2, 1, 3])
    weights_C = torch.tensor([0.0, 0, 0, 0, math.log(3)])
    weighted = Targets(
        Task("vocabulary", C + 2),
        values_N,
        torch.arange(N),
        candidates=Candidates(torch.zeros(C, 2), weights_C, vocabulary=C + 2),
    )
    loss = Contrast(get_family("gaussian"), label_smoothing=smoothing)
    found_N = loss(Messages(forward_NZ, backward_CZ, weighted))
    repeated_CZ = torch.cat([backward_CZ, backward_CZ[4:], backward_CZ[4:]])
    scores_NC = loss.logits(Messages(forward_NZ, repeated_CZ, weighted))
    expected_N = F.cross_entropy(scores_NC, values_N, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(found_N, expected_N)


@FAMILY_NAMES
def test_messages_that_are_the_same_for_every_class_never_beat_guessing(family):
    constant_CZ = normal(1, Z, seed=1).expand(C, Z)
    for scale in (0.0, 1.0, 10.0):
        loss_N, _ = contrast_of(scale * normal(N, Z), scale * constant_CZ, family=family)
        torch.testing.assert_close(loss_N, torch.full((N,), math.log(C)), rtol=1e-4, atol=1e-4)


@FAMILY_NAMES
def test_a_forward_message_that_is_the_same_for_every_sample_never_beats_the_frequency_of_the_classes(family):
    frequency_C = F.one_hot(CLASSES_N, C).float().mean(0)
    entropy = -(frequency_C * frequency_C.log()).sum()
    for seed in range(10):
        constant_NZ = 3 * normal(1, Z, seed=seed).expand(N, Z)
        loss_N, _ = contrast_of(constant_NZ, 3 * normal(C, Z, seed=seed + 100), family=family)
        assert loss_N.mean() >= entropy - 1e-5


@FAMILY_NAMES
def test_contrast_drives_constant_messages_apart_and_beats_guessing(family):
    forward_NZ = normal(N, Z).mul(0.1).requires_grad_()
    backward_CZ = (torch.ones(C, Z) + 0.1 * normal(C, Z, seed=1)).requires_grad_()
    optimizer = torch.optim.Adam([forward_NZ, backward_CZ], lr=0.2)
    for _ in range(150):
        loss_N, _ = contrast_of(forward_NZ, backward_CZ, family=family)
        optimizer.zero_grad()
        loss_N.mean().backward()
        optimizer.step()
    assert loss_N.mean() < 0.5 * math.log(C)


def test_without_messages_the_logits_are_there_already():
    logits_NC = normal(N, C)
    loss_N, same_NC = contrast_of(logits_NC, None)
    assert torch.equal(same_NC, logits_NC)
    torch.testing.assert_close(loss_N, F.cross_entropy(logits_NC, CLASSES_N, reduction="none"))


# ---- Agreement ----


def agreement_of(forward_NZ, targets, family, smoothing=0.0):
    loss = Agreement(get_family(family), label_smoothing=smoothing)
    messages = Messages(forward_NZ, None, targets)
    return loss(messages), loss.logits(messages)


@SMOOTHINGS
def test_categorical_agreement_is_cross_entropy(smoothing):
    forward_NC = normal(N, C)
    loss_N, _ = agreement_of(forward_NC, class_targets(), "categorical", smoothing)
    expected_N = F.cross_entropy(forward_NC, CLASSES_N, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(loss_N, expected_N)


def test_bernoulli_agreement_is_binary_cross_entropy_summed_over_the_labels():
    forward_NC, values_NC = normal(N, C), (normal(N, C, seed=1) > 0).float()
    targets = Targets(Task("multi_label", C), values_NC, torch.arange(N))
    loss_N, _ = agreement_of(forward_NC, targets, "bernoulli")
    expected = F.binary_cross_entropy_with_logits(forward_NC, values_NC)
    torch.testing.assert_close(loss_N.sum() / targets.elements, expected)


@pytest.mark.parametrize("outputs", [1, 3])
def test_gaussian_agreement_is_a_quarter_of_the_squared_error(outputs):
    forward_NM, values_NM = normal(N, outputs), normal(N, outputs, seed=1)
    targets = Targets(Task("regression", outputs), values_NM, torch.arange(N))
    loss_N, _ = agreement_of(forward_NM, targets, "gaussian")
    torch.testing.assert_close(loss_N.sum() / targets.elements, F.mse_loss(forward_NM, values_NM) / 4)


@FAMILY_NAMES
def test_what_agreement_predicts_are_the_parameters_of_the_message(family):
    forward_NC = normal(N, C).bfloat16()
    values = (
        class_targets()
        if family == "categorical"
        else Targets(Task("multi_label", C), torch.ones(N, C), torch.arange(N))
    )
    _, logits_NC = agreement_of(forward_NC, values, family)
    assert logits_NC.dtype == torch.float32
    assert torch.equal(logits_NC, forward_NC.float())


# ---- Both ----


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_in_the_registry_is_one_and_names_its_source(name):
    loss = LOSSES[name](get_family("gaussian"), label_smoothing=0.2)
    assert isinstance(loss, LocalLoss)
    assert "arXiv" in loss.citation
    assert repr(loss) == f"{type(loss).__name__}(family=gaussian, label_smoothing=0.2)"
    assert not list(loss.parameters())


def test_no_smoothing_is_not_worth_a_word():
    assert repr(Contrast(get_family("bernoulli"))) == "Contrast(family=bernoulli)"
