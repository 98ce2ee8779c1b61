"""Labels of every usual shape become one flat list of targets, and what does not count has no say."""

# Shapes: B batch, S sequence, D hidden width, C classes, N targets, R rows.

from __future__ import annotations

import pytest
import torch
from zoo import SPECIMENS

from hf_blocklocal.anatomy.embeddings import vocabulary_size
from hf_blocklocal.anatomy.layers import shifts_labels
from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.errors import TargetError
from hf_blocklocal.feedback import build_head
from hf_blocklocal.targets.batch import (
    IGNORED,
    Targets,
    Task,
    choose_alignment,
    describe_task,
    labels_of,
    pool,
    read_targets,
)


POOLINGS = ("mean", "first", "last")
B, S, D, C = 3, 5, 4, 3
RIGHT_PADDED = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
LEFT_PADDED = RIGHT_PADDED.flip(1)
MASKS = pytest.mark.parametrize("mask_BS", [RIGHT_PADDED, LEFT_PADDED], ids=["right", "left"])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def described(labels, logits_shape, *, vocabulary=None, shifted=False, problem_type=None):
    return describe_task(
        labels, torch.zeros(logits_shape), vocabulary=vocabulary, shifted=shifted, problem_type=problem_type
    )


# ---- What is to be predicted ----


TASKS = {
    "bert": Task("classes", 3),
    "bert_tokens": Task("classes", 5, per_position=True),
    "bert_mlm": Task("vocabulary", 96, per_position=True),
    "bert_multilabel": Task("multi_label", 3),
    "bert_regression": Task("regression", 1),
    "gpt2": Task("vocabulary", 96, per_position=True, shifted=True),
    "llama": Task("vocabulary", 96, per_position=True, shifted=True),
    "t5": Task("vocabulary", 96, per_position=True),
    "whisper": Task("vocabulary", 96, per_position=True),
    "vit": Task("classes", 3),
    "wav2vec2": Task("classes", 3),
}


@pytest.mark.parametrize("name", TASKS)
def test_the_task_of_a_model_shows_in_labels_and_logits(name, borrow):
    model, batch = borrow(name).eval(), SPECIMENS[name].batch(0)
    with torch.no_grad():
        outputs = model(**batch)
    task = describe_task(
        batch["labels"],
        outputs.logits,
        vocabulary=vocabulary_size(model),
        shifted=shifts_labels(model, outputs.loss, outputs.logits, batch["labels"]),
        problem_type=model.config.problem_type,
    )
    assert task == TASKS[name]


def test_several_float_targets_are_labels_unless_the_model_calls_them_a_regression():
    labels = normal(B, C)
    assert described(labels, (B, C)) == Task("multi_label", C)
    assert described(labels, (B, C), problem_type="regression") == Task("regression", C)


def test_a_single_float_target_is_a_regression_in_either_shape():
    assert described(normal(B), (B, 1)) == Task("regression", 1)
    assert described(normal(B, 1), (B, 1)) == Task("regression", 1)


def test_one_label_of_a_model_that_says_multi_label_is_no_regression():
    labels = torch.tensor([[1.0], [0.0], [1.0]])
    assert described(labels, (B, 1), problem_type="multi_label_classification") == Task("multi_label", 1)


def test_a_class_per_position_is_a_token_only_where_it_is_chosen_from_the_vocabulary():
    labels = torch.zeros(B, S, dtype=torch.long)
    assert described(labels, (B, S, 7), vocabulary=7) == Task("vocabulary", 7, per_position=True)
    assert described(labels, (B, S, 7), vocabulary=8) == Task("classes", 7, per_position=True)
    assert described(labels, (B, S, 7)) == Task("classes", 7, per_position=True)


NO_TASK = {
    "transcripts shorter than the frames, as CTC has them": (torch.zeros(B, 2, dtype=torch.long), (B, S, C)),
    "answers by start and end": (torch.zeros(B, 2, dtype=torch.long), (B, S)),
    "truth values": (torch.zeros(B, dtype=torch.bool), (B, 2)),
    "float labels of another number": (torch.zeros(B, 4), (B, C)),
    "masks of pictures": (torch.zeros(B, 4, 4, dtype=torch.long), (B, C, 4, 4)),
}


@pytest.mark.parametrize(("labels", "logits_shape"), NO_TASK.values(), ids=NO_TASK.keys())
def test_labels_that_no_head_fits_are_refused_with_their_shape(labels, logits_shape):
    with pytest.raises(TargetError) as error:
        described(labels, logits_shape)
    assert str(error.value) == (
        f"No feedback head fits labels of shape {tuple(labels.shape)} ({labels.dtype}) for logits of shape "
        f"{logits_shape}. There are heads for one class per sample (B,), one per position (B, S), float labels (B, C) "
        "and regression targets (B,) or (B, M)."
    )


@pytest.mark.parametrize("inputs", [{"input_ids": torch.ones(1)}, {"input_ids": torch.ones(1), "labels": None}])
def test_a_batch_without_labels_is_refused(inputs):
    with pytest.raises(TargetError, match=r"The batch holds no 'labels', only \['input_ids'.*Add a 'labels' column"):
        labels_of(inputs)
    with pytest.raises(TargetError, match="block-local learning needs the target at every block"):
        read_targets(Task("classes", C), inputs)


# ---- Reading ----


def test_every_sample_has_its_class_unless_it_is_ignored():
    targets = read_targets(Task("classes", C), {"labels": torch.tensor([2, IGNORED, 0])})
    assert targets.values.tolist() == [2, 0]
    assert targets.samples_N.tolist() == [0, 2]
    assert (len(targets), targets.elements) == (2, 2)


def test_a_target_of_several_numbers_counts_each_of_them():
    targets = read_targets(Task("multi_label", C), {"labels": torch.ones(B, C)})
    assert (len(targets), targets.elements) == (B, B * C)


def test_a_number_per_sample_becomes_a_column_of_floats():
    targets = read_targets(Task("regression", 1), {"labels": torch.tensor([1, 2, 3])})
    assert targets.values.tolist() == [[1.0], [2.0], [3.0]]
    assert targets.values.dtype == torch.float32


def test_positions_count_unless_they_are_ignored():
    labels = torch.tensor([[1, IGNORED, 2], [IGNORED, IGNORED, 0]])
    targets = read_targets(Task("classes", C, per_position=True), {"labels": labels})
    assert targets.values.tolist() == [1, 2, 0]
    assert targets.positions_N.tolist() == [0, 2, 5]
    assert targets.samples_N.tolist() == [0, 0, 1]


def test_a_causal_model_predicts_the_label_behind_each_position():
    labels = torch.tensor([[7, 8, 9], [IGNORED, 6, IGNORED]])
    targets = read_targets(Task("vocabulary", 10, per_position=True, shifted=True), {"labels": labels})
    assert targets.values.tolist() == [8, 9, 6]
    assert targets.positions_N.tolist() == [0, 1, 3]


def test_labels_that_a_collator_has_shifted_are_not_shifted_again():
    # Two texts packed into one row: the first does not predict the beginning of the second.
    labels, shifted = torch.tensor([[7, 8, 9, 6]]), torch.tensor([[8, IGNORED, 6, IGNORED]])
    task = Task("vocabulary", 10, per_position=True, shifted=True)
    targets = read_targets(task, {"labels": labels, "shift_labels": shifted})
    assert targets.values.tolist() == [8, 6]
    assert targets.positions_N.tolist() == [0, 2]


@pytest.mark.parametrize("per_position", [False, True])
def test_a_batch_in_which_nothing_counts_has_no_targets(per_position):
    labels = torch.full((B, S) if per_position else (B,), IGNORED)
    assert len(read_targets(Task("classes", C, per_position=per_position), {"labels": labels})) == 0


def test_only_a_mask_over_positions_is_one():
    square = torch.ones(B, 1, S, S)
    assert read_targets(Task("classes", C), {"labels": torch.zeros(B), "attention_mask": square}).mask_BS is None
    assert read_targets(Task("classes", C), {"labels": torch.zeros(B), "attention_mask": LEFT_PADDED}).mask_BS is (
        LEFT_PADDED
    )


# ---- Pooling ----


@MASKS
def test_pooling_looks_at_the_states_that_count(mask_BS):
    hidden = normal(B, S, D)
    rows = [states[mask.bool()] for states, mask in zip(hidden, mask_BS, strict=True)]
    torch.testing.assert_close(pool(hidden, mask_BS, "mean"), torch.stack([row.mean(0) for row in rows]))
    assert torch.equal(pool(hidden, mask_BS, "first"), torch.stack([row[0] for row in rows]))
    assert torch.equal(pool(hidden, mask_BS, "last"), torch.stack([row[-1] for row in rows]))


@pytest.mark.parametrize("mask", [None, torch.ones(B, 2 * S)], ids=["none", "of another length"])
def test_without_a_fitting_mask_every_state_counts(mask):
    hidden = normal(B, S, D)
    torch.testing.assert_close(pool(hidden, mask, "mean"), hidden.mean(1))
    assert torch.equal(pool(hidden, mask, "first"), hidden[:, 0])
    assert torch.equal(pool(hidden, mask, "last"), hidden[:, -1])


def test_a_map_is_pooled_over_its_places():
    hidden = normal(B, D, 2, 3)
    torch.testing.assert_close(pool(hidden, None, "mean"), hidden.mean((2, 3)))
    assert torch.equal(pool(hidden, None, "first"), hidden[:, :, 0, 0])
    assert torch.equal(pool(hidden, None, "last"), hidden[:, :, 1, 2])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_sample_of_padding_only_still_pools_to_something_finite(pooling):
    assert pool(normal(B, S, D), torch.zeros(B, S), pooling).isfinite().all()


def test_the_targets_of_a_sample_share_its_pooled_row():
    targets = Targets(
        Task("vocabulary", 9, per_position=True),
        torch.arange(4),
        torch.tensor([0, 0, 2, 2]),
        torch.tensor([0, 1, 4, 5]),
    )
    rows_RD, index_N = targets.rows(normal(B, S, D), "pooled", "mean")
    assert rows_RD.shape == (B, D)
    assert index_N.tolist() == [0, 0, 2, 2]


# ---- What does not count has no say ----


def loss_and_gradients(task, inputs, hidden, *, alignment, pooling="mean"):
    config = BlockLocalConfig(feedback="label", pooling=pooling)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = build_head(config, task, hidden_width=D, alignment=alignment)
    hidden = hidden.clone().requires_grad_()
    loss = head(hidden, read_targets(task, inputs)).sum()
    loss.backward()
    return loss.detach(), hidden.grad, [parameter.grad for parameter in head.parameters()]


def assert_no_say(silent_BS, task, inputs, **how):
    """Assert that the hidden states at the given positions change nothing and get no gradient, and the others do."""
    hidden = normal(B, S, D)
    changed = hidden.where(~silent_BS[..., None], 100 * normal(B, S, D, seed=1))
    loss, gradient, in_head = loss_and_gradients(task, inputs, hidden, **how)
    loss_changed, gradient_changed, in_head_changed = loss_and_gradients(task, inputs, changed, **how)
    assert torch.equal(loss, loss_changed)
    assert torch.equal(gradient, gradient_changed)
    assert all(torch.equal(one, other) for one, other in zip(in_head, in_head_changed, strict=True))
    assert torch.equal((gradient != 0).any(-1), ~silent_BS)


@MASKS
def test_padding_has_no_say_in_the_mean(mask_BS):
    inputs = {"labels": torch.tensor([2, 0, 1]), "attention_mask": mask_BS}
    assert_no_say(~mask_BS.bool(), Task("classes", C), inputs, alignment="pooled")


@MASKS
@pytest.mark.parametrize("pooling", ["first", "last"])
def test_all_but_the_chosen_state_have_no_say(mask_BS, pooling):
    inputs = {"labels": torch.tensor([2, 0, 1]), "attention_mask": mask_BS}
    index_B = [int(mask.nonzero()[0 if pooling == "first" else -1]) for mask in mask_BS]
    silent_BS = torch.ones(B, S, dtype=torch.bool)
    silent_BS[range(B), index_B] = False
    assert_no_say(silent_BS, Task("classes", C), inputs, alignment="pooled", pooling=pooling)


def test_a_sample_whose_label_is_ignored_has_no_say():
    inputs = {"labels": torch.tensor([2, IGNORED, 1])}
    silent_BS = torch.tensor([False, True, False])[:, None].expand(B, S)
    assert_no_say(silent_BS, Task("classes", C), inputs, alignment="pooled")


@MASKS
def test_ignored_positions_have_no_say(mask_BS):
    labels = torch.randint(C, (B, S), generator=torch.Generator().manual_seed(0)).where(mask_BS.bool(), IGNORED)
    inputs = {"labels": labels, "attention_mask": mask_BS}
    assert_no_say(~mask_BS.bool(), Task("classes", C, per_position=True), inputs, alignment="position")


def test_the_last_position_of_a_causal_text_has_no_say():
    labels = torch.randint(C, (B, S), generator=torch.Generator().manual_seed(0)).where(RIGHT_PADDED.bool(), IGNORED)
    inputs = {"labels": labels, "attention_mask": RIGHT_PADDED}
    speaks_BS = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    task = Task("vocabulary", C, per_position=True, shifted=True)
    assert_no_say(~speaks_BS, task, inputs, alignment="position")


@MASKS
def test_padding_of_an_encoder_has_no_say_in_the_targets_of_its_decoder(mask_BS):
    inputs = {"labels": torch.tensor([[1, 2], [0, IGNORED], [2, 2]]), "attention_mask": mask_BS}
    task = Task("vocabulary", C, per_position=True)
    assert_no_say(~mask_BS.bool(), task, inputs, alignment="pooled")


# ---- What a readout looks at ----


def test_a_target_per_position_is_read_at_its_position():
    task = Task("vocabulary", C, per_position=True)
    assert choose_alignment(task, (B, S, D), (B, S), final_stack=True) == "position"


def test_encoders_and_whole_samples_are_pooled():
    per_position = Task("vocabulary", C, per_position=True)
    assert choose_alignment(per_position, (B, 2 * S, D), (B, S), final_stack=False) == "pooled"
    assert choose_alignment(Task("classes", C), (B, S, D), (B,), final_stack=True) == "pooled"


def test_a_prompt_in_front_is_refused_with_both_shapes():
    task = Task("vocabulary", C, per_position=True)
    with pytest.raises(TargetError) as error:
        choose_alignment(task, (B, S + 2, D), (B, S), final_stack=True)
    assert str(error.value) == (
        "The labels have shape (3, 5) but a block puts out (3, 7, 4): a target per position needs one hidden state "
        "per position. Methods that add tokens in front, and models with several states per position, are not "
        "supported."
    )


def test_more_hidden_states_than_samples_are_refused():
    with pytest.raises(TargetError):
        choose_alignment(Task("classes", 4), (4 * B, S, D), (B,), final_stack=True)
