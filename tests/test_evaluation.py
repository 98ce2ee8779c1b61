"""The score of a head is the loss, hits and count that one would work out by hand."""

# Shapes: B batch, N targets, C classes, Z units, K blocks with heads.

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.losses import Agreement, Contrast, Messages
from hf_blocklocal.losses.families import get_family
from hf_blocklocal.targets.batch import Targets, Task
from hf_blocklocal.teaching import evaluation
from hf_blocklocal.teaching.evaluation import BlockScores, score


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def class_messages(num, classes=4, units=3):
    values_N = torch.randint(classes, (num,), generator=torch.Generator().manual_seed(2))
    targets = Targets(Task("classes", classes), values_N, torch.arange(num))
    return Messages(normal(num, units), normal(classes, units, seed=1), targets)


# ---- One head ----


def test_classes_are_scored_by_cross_entropy_and_the_best_guess():
    loss, messages = Contrast(get_family("gaussian")), class_messages(20)
    logits_NC, values_N = loss.logits(messages), messages.targets.values
    scores_N3 = score(loss, messages)
    torch.testing.assert_close(scores_N3[:, 0], F.cross_entropy(logits_NC, values_N, reduction="none"))
    assert torch.equal(scores_N3[:, 1], (logits_NC.argmax(-1) == values_N).float())
    assert torch.equal(scores_N3[:, 2], torch.ones(20))
    assert 0 < scores_N3[:, 1].sum() < 20


def test_float_labels_are_scored_one_by_one():
    logits_NC = torch.tensor([[2.0, -1.0, 0.5], [-3.0, -0.5, 0.1]])
    values_NC = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    targets = Targets(Task("multi_label", 3), values_NC, torch.arange(2))
    scores_N3 = score(Agreement(get_family("bernoulli")), Messages(logits_NC, None, targets))
    assert scores_N3[:, 1].tolist() == [2, 1]
    assert scores_N3[:, 2].tolist() == [3, 3]
    expected = F.binary_cross_entropy_with_logits(logits_NC, values_NC)
    torch.testing.assert_close(scores_N3[:, 0].sum() / scores_N3[:, 2].sum(), expected)


@pytest.mark.parametrize("outputs", [1, 2])
def test_numbers_are_neither_right_nor_wrong(outputs):
    predicted_NM, values_NM = normal(5, outputs), normal(5, outputs, seed=1)
    targets = Targets(Task("regression", outputs), values_NM, torch.arange(5))
    scores_N3 = score(Agreement(get_family("gaussian")), Messages(predicted_NM, None, targets))
    assert (scores_N3[:, 1] == 0).all()
    assert (scores_N3[:, 2] == outputs).all()
    torch.testing.assert_close(scores_N3[:, 0].sum() / scores_N3[:, 2].sum(), F.mse_loss(predicted_NM, values_NM))


@pytest.mark.parametrize("num", [511, 512, 513, 1030])
def test_scores_do_not_depend_on_how_many_rows_are_held_at_a_time(num, monkeypatch):
    loss, messages = Contrast(get_family("categorical")), class_messages(num)
    in_chunks = score(loss, messages)
    monkeypatch.setattr(evaluation, "_CHUNK", num)
    assert in_chunks.shape == (num, 3)
    torch.testing.assert_close(in_chunks, score(loss, messages), rtol=1e-6, atol=1e-6)


def test_no_more_rows_than_that_are_ever_held():
    class Counting(Contrast):
        rows = []

        def logits(self, messages):
            self.rows.append(len(messages.forward_NZ))
            return super().logits(messages)

    score(Counting(get_family("gaussian")), class_messages(1030))
    assert max(Counting.rows) == 512
    assert set(Counting.rows) == {512, 6}


def test_nothing_to_score_is_a_table_without_rows():
    assert score(Contrast(get_family("gaussian")), class_messages(0)).shape == (0, 3)


# ---- All blocks ----


def scores_of(*batches):
    scores = BlockScores(step=None)
    for batch in batches:
        scores.add(torch.tensor(batch))
    return scores.metrics("eval")


def test_metrics_are_means_over_the_targets_of_all_batches():
    # Two blocks; the first batch has two samples with 1 and 3 targets, the second one sample with 4.
    first = [[[2.0, 1.0, 1.0], [0.5, 0.0, 1.0]], [[3.0, 2.0, 3.0], [1.5, 3.0, 3.0]]]
    second = [[[3.0, 1.0, 4.0], [6.0, 1.0, 4.0]]]
    assert scores_of(first, second) == pytest.approx(
        {
            "eval_block_0_loss": 8 / 8,
            "eval_block_0_accuracy": 4 / 8,
            "eval_block_1_loss": 8 / 8,
            "eval_block_1_accuracy": 4 / 8,
        }
    )
    assert scores_of(first)["eval_block_1_accuracy"] == pytest.approx(3 / 4)


def test_samples_that_only_fill_a_batch_can_be_left_out():
    batch = torch.tensor([[[2.0, 1.0, 1.0]], [[9.0, 0.0, 1.0]]])
    scores = BlockScores(step=None)
    scores.add(batch[:1])
    assert scores.metrics("test") == {"test_block_0_loss": 2.0, "test_block_0_accuracy": 1.0}


def test_without_targets_there_are_no_metrics():
    assert BlockScores(step=None).metrics("eval") == {}
    assert scores_of([[[0.0, 0.0, 0.0]]]) == {}


@pytest.mark.parametrize("name", ["bert", "bert_tokens", "bert_regression", "gpt2", "t5"])
def test_watching_a_forward_pass_scores_every_head_sample_by_sample(name, borrow):
    model, batch = borrow(name).eval(), SPECIMENS[name].batch(0)
    assembly = assemble(model, BlockLocalConfig(boundaries=(1, 2), head_layers=0), batch)
    targets = assembly.read_targets(batch, whole_vocabulary=True)
    hidden = []
    with torch.no_grad():
        with assembly.step.boundaries.attached(lambda _block, state, _logits: hidden.append(state)):
            plain = model(**batch).logits
        scores = BlockScores(assembly.step)
        with scores.watch(targets, batch):
            watched = model(**batch).logits
        losses_KN = [head(state, targets) for head, state in zip(assembly.heads, hidden, strict=True)]
    if name == "bert_regression":  # the agreement is a quarter of the squared error
        losses_KN = [4 * loss_N for loss_N in losses_KN]
    assert torch.equal(watched, plain)
    assert scores.batch_BK3.shape == (len(batch["labels"]), 2, 3)
    for block, loss_N in enumerate(losses_KN):
        for sample in range(len(batch["labels"])):
            mine_N = targets.samples_N == sample
            torch.testing.assert_close(scores.batch_BK3[sample, block, 0], loss_N[mine_N].sum(), rtol=1e-5, atol=1e-5)
            assert scores.batch_BK3[sample, block, 2] == mine_N.sum()
    scores.add(scores.batch_BK3)
    metrics = scores.metrics("eval")
    assert metrics["eval_block_1_loss"] == pytest.approx(losses_KN[1].mean().item(), rel=1e-5)
    assert ("eval_block_1_accuracy" in metrics) == (name != "bert_regression")


def test_scores_are_kept_only_of_a_pass_that_went_through(borrow):
    model, batch = borrow("bert"), SPECIMENS["bert"].batch(0)
    assembly = assemble(model, BlockLocalConfig(head_layers=0), batch)
    scores = BlockScores(assembly.step)
    with pytest.raises(ArithmeticError), scores.watch(assembly.read_targets(batch), batch):
        raise ArithmeticError("on purpose")
    assert scores.batch_BK3 is None
