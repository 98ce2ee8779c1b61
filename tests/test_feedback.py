"""Every head fits its task, says so where it does not, and teaches both of its halves."""

# Shapes: B batch, S sequence, D hidden width, C classes or candidates, N targets, Z units, E embedding width.

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.config.presets import PRESETS
from hf_blocklocal.errors import BlockLocalError, TargetError
from hf_blocklocal.feedback import FEEDBACK, DirectFeedback, LabelFeedback, build_head
from hf_blocklocal.losses import LOSSES
from hf_blocklocal.losses.families import FAMILIES
from hf_blocklocal.targets.batch import Task, read_targets
from hf_blocklocal.targets.sampling import with_candidates


B, S, D, C, E, Z = 4, 3, 6, 5, 7, 8
CLASSES = Task("classes", C)
TAGS = Task("classes", C, per_position=True)
TOKENS = Task("vocabulary", 40, per_position=True)
LABELS = Task("multi_label", C)
NUMBERS = Task("regression", 2)
TASKS = {"classes": CLASSES, "tags": TAGS, "tokens": TOKENS, "labels": LABELS, "numbers": NUMBERS}
NATURAL = {
    "classes": "categorical",
    "tags": "categorical",
    "tokens": "categorical",
    "labels": "bernoulli",
    "numbers": "gaussian",
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_targets(task, negatives=6):
    generator = torch.Generator().manual_seed(0)
    if task.target == "multi_label":
        labels = torch.randint(2, (B, task.size), generator=generator).float()
    elif task.target == "regression":
        labels = normal(B, task.size)
    else:
        labels = torch.randint(task.size, (B, S) if task.per_position else (B,), generator=generator)
    targets = read_targets(task, {"labels": labels})
    if task.target == "vocabulary":
        return with_candidates(targets, normal(task.size, E), negatives=negatives, generator=generator)
    return targets


def head_for(task, *, smoothing=0.0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_head(
            BlockLocalConfig(**{"latent_dim": Z, "head_layers": 0, **options}),
            task,
            hidden_width=D,
            alignment="position" if task.per_position else "pooled",
            embedding_width=E if task.target == "vocabulary" else None,
            label_smoothing=smoothing,
        )


# ---- Which head a task gets ----


CHOICES = {
    "classes": (DirectFeedback, "Contrast", "gaussian", Z),
    "tags": (DirectFeedback, "Contrast", "gaussian", Z),
    "tokens": (DirectFeedback, "Contrast", "gaussian", Z),
    "labels": (LabelFeedback, "Agreement", "bernoulli", C),
    "numbers": (LabelFeedback, "Agreement", "gaussian", 2),
}


@pytest.mark.parametrize("name", TASKS)
def test_left_to_itself_a_head_contrasts_what_can_be_counted_and_agrees_with_the_rest(name):
    head = head_for(TASKS[name])
    found = (type(head.feedback), type(head.loss).__name__, head.loss.family.name, head.readout.linear.out_features)
    assert found == CHOICES[name]


@pytest.mark.parametrize("name", TASKS)
def test_label_feedback_takes_the_natural_family_of_any_task(name):
    head = head_for(TASKS[name], feedback="label")
    assert (head.loss.family.name, head.feedback.units) == (NATURAL[name], TASKS[name].size)
    assert not list(head.feedback.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_direct_feedback_takes_any_family(family):
    assert head_for(CLASSES, feedback="direct", family=family).loss.family.name == family


def test_what_the_user_sets_reaches_the_head():
    head = head_for(CLASSES, pooling="last", smoothing=0.3)
    assert (head.pooling, head.alignment, head.loss.label_smoothing) == ("last", "pooled", 0.3)


def test_over_a_vocabulary_a_block_pays_for_no_table_of_tokens():
    assert head_for(TOKENS).feedback.table.weight.shape == (Z, E)
    assert head_for(CLASSES).feedback.table.weight.shape == (C, Z)


def test_the_preset_pred_is_a_linear_classifier():
    head, hidden = head_for(CLASSES, **{"feedback": "label", "loss": "agreement"}), normal(B, S, D)
    targets = some_targets(CLASSES)
    logits_NC = head.readout(hidden.mean(1))
    torch.testing.assert_close(head.logits(hidden, targets), logits_NC)
    torch.testing.assert_close(head(hidden, targets), F.cross_entropy(logits_NC, targets.values, reduction="none"))


def test_the_preset_dgl_is_a_classifier_with_a_hidden_layer():
    head, hidden = head_for(CLASSES, **PRESETS["dgl"]), normal(B, S, D)
    norm, into, out = (getattr(head.readout, name) for name in ("norm", "hidden", "linear"))
    assert into.weight.shape == (D, D)
    inside_BD = F.linear(F.layer_norm(hidden.mean(1), (D,), norm.weight, norm.bias), into.weight, into.bias)
    logits_NC = F.linear(F.gelu(inside_BD), out.weight, out.bias)
    targets = some_targets(CLASSES)
    found = torch.autograd.grad(head(hidden, targets).sum(), list(head.parameters()))
    expected = torch.autograd.grad(
        F.cross_entropy(logits_NC, targets.values, reduction="sum"), list(head.parameters())
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", TASKS)
def test_a_readout_with_a_hidden_layer_learns_any_task(name):
    head = head_for(TASKS[name], readout="mlp")
    head(normal(B, S, D), some_targets(TASKS[name], negatives=None)).sum().backward()
    assert_learns(head)


# ---- Refusals ----


@pytest.mark.parametrize("name", ["labels", "numbers"])
def test_direct_feedback_refuses_targets_that_cannot_be_counted(name):
    task = TASKS[name]
    with pytest.raises(TargetError) as error:
        head_for(task, feedback="direct")
    assert str(error.value) == (
        f"feedback='direct' cannot carry {task.target!r} targets: it contrasts a target with all others, which needs "
        "a finite set. Use feedback='auto' or 'label'."
    )
    with pytest.raises(TargetError, match=f"a finite set of targets to contrast, not {task.target!r} targets"):
        DirectFeedback(task, latent_dim=Z)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TASKS)
def test_label_feedback_refuses_a_family_that_does_not_describe_the_target(name, family):
    task, natural = TASKS[name], NATURAL[name]
    if family == natural:
        assert head_for(task, feedback="label", family=family).loss.family.name == natural
        return
    with pytest.raises(TargetError) as error:
        head_for(task, feedback="label", family=family)
    assert str(error.value) == (
        f"family={family!r} does not describe {task.target!r} targets, and with feedback='label' the latent is the "
        f"target. Use family='auto' or {natural!r}."
    )


@pytest.mark.parametrize(("feedback", "loss"), [("direct", "agreement"), ("label", "contrast"), ("auto", "agreement")])
def test_a_loss_that_the_feedback_has_not_is_refused(feedback, loss):
    with pytest.raises(BlockLocalError):
        head_for(CLASSES, feedback=feedback, loss=loss)


# ---- Learning ----


PAIRS = [(name, task) for name, network in FEEDBACK.items() for task in TASKS if network.fits(TASKS[task])]


def assert_learns(part):
    gradients = [parameter.grad for parameter in part.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert all((gradient != 0).any() for gradient in gradients)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("feedback", "name"), PAIRS)
def test_every_feedback_gives_a_finite_loss_and_teaches_readout_feedback_and_block(feedback, name, smoothing):
    families = FAMILIES if feedback == "direct" else [NATURAL[name]]
    for family in families:
        head = head_for(TASKS[name], feedback=feedback, family=family, smoothing=smoothing)
        hidden, targets = normal(B, S, D).requires_grad_(), some_targets(TASKS[name], negatives=None)
        loss_N = head(hidden, targets)
        assert loss_N.shape == (len(targets),)
        assert loss_N.isfinite().all()
        loss_N.sum().backward()
        assert_learns(head.readout)
        assert_learns(head.feedback)
        assert (hidden.grad != 0).any(-1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_direct_feedback_learns_from_sampled_candidates(family):
    head, targets = head_for(TOKENS, family=family), some_targets(TOKENS, negatives=6)
    loss_N = head(normal(B, S, D), targets)
    assert head.logits(normal(B, S, D), targets).shape == (B * S, len(targets.candidates.log_weights_C))
    loss_N.sum().backward()
    assert_learns(head)


@pytest.mark.parametrize("specimen", ["bert", "gpt2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_direct_feedback_of_any_family_lowers_the_loss_of_the_first_block_of_a_model(borrow, family, specimen):
    model, batch = borrow(specimen), SPECIMENS[specimen].batch(0)
    config = BlockLocalConfig(num_blocks=2, feedback="direct", family=family, latent_dim=12, negatives=None)
    assembly = assemble(model, config, batch)
    optimizer = torch.optim.Adam(assembly.parameters[0], lr=0.02)
    losses = []

    def backward(loss):
        losses.append(loss.item())
        loss.backward()

    for _ in range(25):
        targets = assembly.read_targets(batch)
        with assembly.step.teach(targets, scale=1.0, backward=backward, learned=lambda *done: optimizer.step()):
            model(**batch)
        optimizer.zero_grad()
    assert len(losses) == 25
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("name", FEEDBACK)
def test_every_feedback_names_a_loss_that_there_is(name):
    assert FEEDBACK[name].loss in LOSSES
    assert FEEDBACK[name].fits(CLASSES)


def test_direct_feedback_contrasts_as_well_as_any_matrix_of_weights():
    head, hidden = head_for(CLASSES), normal(B, S, D)
    a_NZ, b_CZ = head.readout(hidden.mean(1)), head.feedback.table.weight
    expected_NC = F.linear(a_NZ, b_CZ) / 2 - b_CZ.square().sum(-1) / 4
    torch.testing.assert_close(head.logits(hidden, some_targets(CLASSES)), expected_NC)


def test_label_feedback_over_the_whole_vocabulary_is_cross_entropy_of_the_tokens(borrow):
    model, batch = borrow("gpt2"), SPECIMENS["gpt2"].batch(0)
    assert_teaches_the_tokens(model, batch, negatives=None)


def test_label_feedback_beside_sampled_negatives_is_cross_entropy_of_the_tokens(borrow):
    model, batch = borrow("gpt2"), SPECIMENS["gpt2"].batch(0)
    assert_teaches_the_tokens(model, batch, negatives=4)


def assert_teaches_the_tokens(model, batch, *, negatives):
    config = BlockLocalConfig(feedback="label", negatives=negatives)
    assembly = assemble(model, config, batch)
    head, hidden = assembly.heads[0], normal(*batch["labels"].shape, 16)
    tokens = read_targets(assembly.task, batch)
    logits_NC = head.readout(hidden.flatten(0, 1)[tokens.positions_N])
    expected_N = F.cross_entropy(logits_NC, tokens.values, reduction="none")
    torch.testing.assert_close(head(hidden, assembly.read_targets(batch)), expected_N)
