"""The preset kappel2023 is the formula in its docstring, written down here a second time."""

# Shapes: B batch, S sequence, D hidden width, C classes, N targets.

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hf_blocklocal import BlockLocalConfig
from hf_blocklocal.config.presets import PRESETS
from hf_blocklocal.errors import TargetError
from hf_blocklocal.feedback import PrototypeFeedback, build_head
from hf_blocklocal.targets.batch import Task, read_targets


B, S, D, C = 6, 3, 5, 4
CLASSES = Task("classes", C)
TAGS = Task("classes", C, per_position=True)
OTHERS = [Task("regression", 2), Task("multi_label", C), Task("vocabulary", 9, per_position=True)]
LABELS_B = torch.tensor([0, 2, 2, -100, 0, 1])  # nobody is of class 3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head_of(task):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        alignment = "position" if task.per_position else "pooled"
        config = BlockLocalConfig(**PRESETS["kappel2023"])
        return build_head(config, task, hidden_width=D, alignment=alignment, embedding_width=7)


def rows_and_labels(task, hidden):
    """Return the rows that count, their classes, and all labels."""
    if not task.per_position:
        return hidden.mean(1)[LABELS_B != -100], LABELS_B[LABELS_B != -100], LABELS_B
    labels_BS = torch.stack([LABELS_B, LABELS_B.roll(1), LABELS_B.roll(2)], dim=1)
    return hidden[labels_BS != -100], labels_BS[labels_BS != -100], labels_BS


def direction(row):
    row = row - row.mean()
    return row / (row @ row).sqrt()


def reference(head, rows_ND, classes_N):
    prediction = F.cross_entropy(head.readout(rows_ND), classes_N)
    x, count = [direction(row) for row in rows_ND], len(rows_ND)
    pairs = [(x[i] @ x[j]) ** 2 for i in range(count) for j in range(count) if i != j]
    b = head.feedback.table.weight.T
    towards = sum(b[label].detach() @ x[n] for n, label in enumerate(classes_N.tolist())) / count
    distances = []
    for label in sorted(set(classes_N.tolist())):
        members = [x[n].detach() for n in range(count) if classes_N[n] == label]
        distances.append((b[label] - sum(members) / len(members)).square().mean())
    regression = sum(distances) / len(distances)
    return 0.5 * prediction + 0.7 * sum(pairs) / len(pairs) - 0.25 * towards + 0.5 * regression


@pytest.mark.parametrize("task", [CLASSES, TAGS], ids=["classes", "tags"])
def test_the_preset_kappel2023_is_its_formula(task):
    head, hidden = head_of(task), normal(B, S, D).requires_grad_()
    rows_ND, classes_N, labels = rows_and_labels(task, hidden)
    found = head(hidden, read_targets(task, {"labels": labels})).mean()
    expected = reference(head, rows_ND, classes_N)
    torch.testing.assert_close(found, expected)
    inputs = [hidden, *head.parameters()]
    torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))


def test_what_a_prototype_head_predicts_is_what_its_readout_says():
    head, hidden = head_of(CLASSES), normal(B, S, D)
    rows_ND, _, labels_B = rows_and_labels(CLASSES, hidden)
    logits_NC = head.logits(hidden, read_targets(CLASSES, {"labels": labels_B}))
    torch.testing.assert_close(logits_NC, head.readout(rows_ND))


def test_a_prototype_learns_to_be_the_mean_of_its_class_and_nothing_else():
    head, hidden = head_of(CLASSES), normal(B, S, D)
    rows_ND, classes_N, labels_B = rows_and_labels(CLASSES, hidden)
    before_CD = head.feedback.table.weight.T.detach().clone()
    optimizer = torch.optim.SGD(head.feedback.parameters(), lr=2.0)
    for _ in range(200):
        optimizer.zero_grad()
        head(hidden, read_targets(CLASSES, {"labels": labels_B})).mean().backward()
        optimizer.step()
    after_CD = head.feedback.table.weight.T.detach()
    x_ND = torch.stack([direction(row) for row in rows_ND])
    for label in (0, 1, 2):
        torch.testing.assert_close(after_CD[label], x_ND[classes_N == label].mean(0))
    assert torch.equal(after_CD[3], before_CD[3])


@pytest.mark.parametrize("labels", [[-100, -100], [1, -100]], ids=["none", "one"])
def test_too_few_targets_to_compare_give_no_gradient_that_is_not_a_number(labels):
    head = head_of(CLASSES)
    head(normal(2, S, D), read_targets(CLASSES, {"labels": torch.tensor(labels)})).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


@pytest.mark.parametrize("task", OTHERS, ids=lambda task: task.target)
def test_targets_that_are_no_classes_have_no_prototypes(task):
    with pytest.raises(TargetError) as error:
        head_of(task)
    assert str(error.value) == (
        f"feedback='prototype' cannot carry {task.target!r} targets: it learns a prototype of each class. Use "
        "feedback='auto' or 'label'."
    )
    with pytest.raises(TargetError, match="Prototypes need classes and the width of the block"):
        PrototypeFeedback(task, latent_dim=8, hidden_width=D)
