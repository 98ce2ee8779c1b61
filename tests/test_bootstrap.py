"""Early in training a block hands on what its readout would say had it seen the target; evaluation never sees it."""

# Shapes: B batch, S sequence, D hidden width, N targets, C classes, Z units of the latent.

from __future__ import annotations

import pytest
import torch
from test_feedback import CLASSES, TAGS, head_for
from test_parity import arguments, equal, examples, with_dropout
from torch.nn import functional as F
from training import make, snapshot, whole_and_resumed
from transformers import Trainer
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer, assemble
from hf_blocklocal.errors import TargetError
from hf_blocklocal.feedback import FeedbackHead, LinearReadout
from hf_blocklocal.losses.families import FAMILIES
from hf_blocklocal.targets.batch import Targets, Task, read_targets
from hf_blocklocal.teaching.bootstrap import bootstrap_weight


B, S, D, Z = 4, 3, 6, 4


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- The schedule ----


@pytest.mark.parametrize(
    ("start", "until", "total", "weights"),
    [
        (0.0, 0.5, 4, [0.0] * 4),
        (1.0, 0.5, 8, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]),
        (0.5, 0.25, 8, [0.5, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
        (1.0, 0.99, 5, [1.0, 0.75, 0.5, 0.25, 0.0]),
        (1.0, 0.5, 1, [0.0]),
        (1.0, 0.9, 2, [1.0, 0.0]),
    ],
)
def test_the_weight_falls_to_zero_before_the_run_ends(start, until, total, weights):
    config = BlockLocalConfig(bootstrap=start, bootstrap_until=until)
    assert [bootstrap_weight(step, total, config) for step in range(total)] == pytest.approx(weights)
    assert bootstrap_weight(total - 1, total, config) == 0.0


def test_outside_of_a_run_there_is_no_leak():
    config = BlockLocalConfig(bootstrap=1.0)
    assert bootstrap_weight(0, 0, config) == bootstrap_weight(9, 8, config) == 0.0


# ---- The move ----


def mixed_head(task, family, **options):
    """A head whose layer norm has something to say too."""
    head = head_for(task, feedback="direct", family=family, latent_dim=Z, **options)
    with torch.no_grad():
        head.readout.norm.weight.copy_(1 + 0.3 * normal(D, seed=1))
        head.readout.norm.bias.copy_(normal(D, seed=2))
    return head


def read_with_statistics_of(readout, moved_RD, rows_RD):
    """What a readout says of moved rows if its layer norm shifts and scales them as it does the rows themselves."""
    mean_R1, variance_R1 = rows_RD.mean(1, keepdim=True), rows_RD.var(1, unbiased=False, keepdim=True)
    normalised_RD = (moved_RD - mean_R1) / (variance_R1 + readout.norm.eps).sqrt()
    return readout.linear(normalised_RD * readout.norm.weight + readout.norm.bias)


def expected_answer(family, a_NZ, b_NZ, weight):
    if family == "gaussian":
        return (a_NZ + weight * b_NZ) / (1 + weight)
    return a_NZ + weight * b_NZ


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_readout_of_a_sample_is_moved_to_the_posterior(family, weight, pooling):
    head, hidden = mixed_head(CLASSES, family, pooling=pooling), normal(B, S, D)
    labels = torch.tensor([3, 0, 1, 1])
    mask_BS = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    targets = read_targets(CLASSES, {"labels": labels, "attention_mask": mask_BS})
    messages = head.messages(hidden, targets)
    moved = head.bootstrapped(hidden, messages, weight)
    assert not moved.requires_grad
    change_BSD = moved - hidden
    torch.testing.assert_close(change_BSD, change_BSD[:, :1].expand(-1, S, -1))
    rows, moved_rows = (targets.rows(state, "pooled", pooling)[0] for state in (hidden, moved))
    b_NZ = head.feedback.table.weight[labels]
    expected = expected_answer(family, head.readout(rows), b_NZ, weight)
    found = read_with_statistics_of(head.readout, moved_rows, rows)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    # The layer norm scales the moved rows anew, so what is read in the end is near the posterior, and not it.
    assert head(moved, targets).sum() < head(hidden, targets).sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_position_is_moved_by_its_own_target(family):
    head, hidden = mixed_head(TAGS, family), normal(B, S, D)
    labels = torch.tensor([[0, 1, -100], [2, -100, -100], [-100, -100, -100], [4, 3, 2]])
    targets = read_targets(TAGS, {"labels": labels})
    moved = head.bootstrapped(hidden, head.messages(hidden, targets), 1.0)
    counts = labels != -100
    assert torch.equal(moved[~counts], hidden[~counts])
    expected = expected_answer(
        family, head.readout(hidden[counts]), head.feedback.table.weight[labels[counts]], weight=1.0
    )
    found = read_with_statistics_of(head.readout, moved[counts], hidden[counts])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_sample_without_a_target_stays_and_one_with_several_goes_to_their_mean():
    hidden, change_ND = normal(3, S, D), normal(3, D, seed=1)
    task, samples_N = Task("classes", 5, per_position=True), torch.tensor([0, 0, 2])
    targets = Targets(task, torch.tensor([1, 2, 3]), samples_N)
    moved = targets.moved(hidden, change_ND, "pooled")
    torch.testing.assert_close(moved[0], hidden[0] + change_ND[:2].mean(0))
    assert torch.equal(moved[1], hidden[1])
    torch.testing.assert_close(moved[2], hidden[2] + change_ND[2])


def test_feature_maps_are_moved_alike_everywhere():
    hidden, change_ND = normal(2, D, 3, 5), normal(2, D, seed=1)
    targets = Targets(CLASSES, torch.tensor([1, 2]), torch.arange(2))
    moved = targets.moved(hidden, change_ND, "pooled")
    torch.testing.assert_close(moved - hidden, change_ND[:, :, None, None].expand(2, D, 3, 5))
    pooled = [targets.rows(state, "pooled", "mean")[0] for state in (hidden, moved)]
    torch.testing.assert_close(pooled[1] - pooled[0], change_ND)


def test_no_smaller_change_does_it():
    readout, rows, change = LinearReadout(D, Z), normal(5, D), normal(5, Z, seed=1)
    found = readout.carry_back(rows, change)
    map_ZD = readout.linear.weight.detach()
    # Among all that a layer norm can put out: rows whose units sum to 0.
    bound = torch.cat([map_ZD, torch.ones(1, D)])
    smallest = torch.linalg.lstsq(bound.double(), F.pad(change, (0, 1)).double().T, driver="gelsd").solution.T
    deviation = (rows.var(1, unbiased=False, keepdim=True) + readout.norm.eps).sqrt()
    torch.testing.assert_close(found, smallest.float() * deviation, rtol=1e-3, atol=1e-5)


def test_what_no_row_can_say_is_approached():
    readout, rows, change = LinearReadout(D, 3 * D), normal(5, D), normal(5, 3 * D, seed=1)
    found = readout.carry_back(rows, change) / (rows.var(1, unbiased=False, keepdim=True) + readout.norm.eps).sqrt()
    remains = change - found @ readout.linear.weight.detach().T
    map_ZD = readout.linear.weight.detach()
    map_ZD = map_ZD - map_ZD.mean(1, keepdim=True)
    torch.testing.assert_close(remains @ map_ZD, torch.zeros(5, D), rtol=0, atol=1e-4)
    assert found.isfinite().all()


# ---- In a step ----


def assembled(name, num_blocks, **values):
    batch = SPECIMENS[name].batch(0)
    config = BlockLocalConfig(num_blocks=num_blocks, latent_dim=Z, **values)
    model = SPECIMENS[name].build()
    return assemble(model, config, batch), model, batch


def run(assembly, model, batch, weight, backward=torch.Tensor.backward):
    targets = assembly.read_targets(batch)
    lesson = assembly.step.teach(targets, scale=1.0, backward=backward, learned=lambda *_: None, bootstrap=weight)
    with lesson:
        return model(**batch).loss


def test_the_next_block_is_fed_the_posterior_mean_and_sends_nothing_back():
    assembly, model, batch = assembled("bert", 2)
    run(assembly, model, batch, 1.0).backward()
    found = {key: p.grad.clone() for key, p in assembly.module.named_parameters() if p.grad is not None}
    assembly.module.zero_grad()

    head, mask_BS = assembly.heads[0], batch["attention_mask"]
    hidden = model.bert.embeddings(input_ids=batch["input_ids"])
    mask = torch.where(mask_BS.bool(), 0.0, float("-inf"))[:, None, None, :].expand(-1, 1, mask_BS.shape[1], -1)
    for index, layer in enumerate(model.bert.encoder.layer):
        hidden = layer(hidden, attention_mask=mask)
        if index == 1:
            rows_BD = (hidden * mask_BS.unsqueeze(-1)).sum(1) / mask_BS.sum(1, keepdim=True)
            a_BZ, table_CZ = head.readout(rows_BD), head.feedback.table.weight
            distances = (a_BZ.unsqueeze(1) - table_CZ).square().sum(-1) / 4
            F.cross_entropy(-distances, batch["labels"], reduction="sum").backward()
            with torch.no_grad():
                wanted_BZ = (a_BZ + table_CZ[batch["labels"]]) / 2 - a_BZ
                centred_ZD = head.readout.linear.weight - head.readout.linear.weight.mean(1, keepdim=True)
                deviation_B1 = (rows_BD.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
                change_BD = wanted_BZ @ torch.linalg.pinv(centred_ZD).T * deviation_B1
                hidden = (hidden + change_BD.unsqueeze(1)).detach()
    F.cross_entropy(model.classifier(model.bert.pooler(hidden)), batch["labels"]).backward()
    theirs = {key: p.grad for key, p in assembly.module.named_parameters() if p.grad is not None}
    assert found.keys() == theirs.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, theirs[key], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("feedback", ["direct", "chained"])
@pytest.mark.parametrize("name", ["bert", "bert_mlm", "gpt2", "t5", "vit", "mixtral"])
def test_a_loss_stays_in_its_block(name, feedback):
    assembly, model, batch = assembled(name, 4, feedback=feedback)
    names = {parameter: key for key, parameter in assembly.module.named_parameters()}
    mine = [{names[parameter] for parameter in block} for block in assembly.parameters]
    tied = {names[model.get_input_embeddings().weight]} if assembly.task.target == "vocabulary" else set()
    for block in range(4):
        seen = []

        def backward(loss, block=block, seen=seen):
            seen.append(loss)
            if len(seen) == block + 1:
                loss.backward()

        loss = run(assembly, model, batch, 0.7, backward)
        if block == 3:
            loss.backward()
        reached = {key for p, key in names.items() if p.grad is not None and p.grad.abs().max() > 0}
        assert reached
        assert reached - tied <= mine[block]
        assembly.module.zero_grad()


def test_the_last_block_sees_the_target_coming():
    """Where blocks are moved, the model's own loss is another; at weight 0 it is the same to the bit."""
    assembly, model, batch = assembled("bert", 4)
    plain = model(**batch).loss
    assert torch.equal(run(assembly, model, batch, 0.0), plain)
    assert not torch.allclose(run(assembly, model, batch, 1.0), plain, rtol=1e-3)


# ---- Through the Trainer ----


@pytest.fixture
def moves(monkeypatch):
    """Weights of the moves so far, each of one block."""
    seen, plain = [], FeedbackHead.bootstrapped

    def move(head, hidden, messages, weight):
        assert head.training
        seen.append(weight)
        return plain(head, hidden, messages, weight)

    monkeypatch.setattr(FeedbackHead, "bootstrapped", move)
    return seen


def test_a_run_moves_in_its_first_local_steps_and_never_in_evaluation(moves, tmp_path):
    config = BlockLocalConfig(num_blocks=4, bootstrap=0.8, bootstrap_until=0.5, global_every=2)
    rows = examples(SPECIMENS["bert"])[:8]
    trainer = make(
        "bert", tmp_path, config=config, max_steps=8, eval_dataset=rows, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    assert moves == pytest.approx([0.8] * 3 + [0.4] * 3)


def test_evaluation_is_that_of_the_model_itself(moves, tmp_path):
    rows = examples(SPECIMENS["bert"])[:4]
    trainer = make("bert", tmp_path, config=BlockLocalConfig(num_blocks=4, bootstrap=1.0), eval_dataset=rows)
    trainer.train()
    moves.clear()
    loss = trainer.evaluate()["eval_loss"]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    with torch.no_grad():
        assert loss == pytest.approx(trainer.model.eval()(**batch).loss.item(), rel=1e-6)
    assert not moves


def test_where_it_has_fallen_to_zero_a_step_is_that_of_a_run_without_to_the_bit(tmp_path):
    """A run with bootstrapping, killed where the leak ends, goes on as a run that never had any."""
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    whole = make("bert", tmp_path, config=BlockLocalConfig(num_blocks=4, bootstrap=1.0), **settings)
    whole.train()
    plain = make("bert", tmp_path / "plain", config=BlockLocalConfig(num_blocks=4, head_layers=0), **settings)
    plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert equal(snapshot(whole), snapshot(plain))
    never = make("bert", tmp_path / "never", config=BlockLocalConfig(num_blocks=4, head_layers=0), **settings)
    never.train()
    assert not equal(snapshot(whole), snapshot(never))


@pytest.mark.parametrize("step_per_block", [False, True])
def test_a_killed_run_resumes_to_the_bit(step_per_block, tmp_path):
    config = BlockLocalConfig(num_blocks=4, bootstrap=0.5, bootstrap_until=0.9, step_per_block=step_per_block)
    whole, resumed = whole_and_resumed(tmp_path, killed_after=6, config=config, max_steps=9, save_steps=4)
    assert equal(snapshot(whole), snapshot(resumed))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_stepping_each_block_at_once_changes_no_bit(name, accumulation, tmp_path):
    states = []
    for at_once in (False, True):
        config = BlockLocalConfig(
            num_blocks=4, bootstrap=1.0, bootstrap_until=0.9, feedback="chained", step_per_block=at_once
        )
        trainer = make(name, tmp_path, config=config, max_steps=5, gradient_accumulation_steps=accumulation)
        trainer.train()
        states.append(snapshot(trainer))
    assert equal(*states)


def test_one_block_is_the_plain_trainer_to_the_bit(tmp_path):
    states = []
    config = BlockLocalConfig(num_blocks=1, bootstrap=1.0)
    for kind, extra in ((Trainer, {}), (BlockLocalTrainer, {"block_local": config})):
        rows = examples(SPECIMENS["bert"])
        trainer = kind(with_dropout("bert"), arguments(tmp_path, max_steps=4), train_dataset=rows, **extra)
        trainer.train()
        states.append(trainer.model.state_dict())
    assert equal(*states)


@pytest.mark.parametrize("setting", [{"bf16": True}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_it_goes_with_checkpointing_and_mixed_precision(moves, name, setting, tmp_path):
    trainer = make(name, tmp_path, config=BlockLocalConfig(num_blocks=4, bootstrap=1.0), max_steps=4, **setting)
    trainer.train()
    assert len(moves) == 2 * 3
    assert all(value.isfinite().all() for value in snapshot(trainer).values())


def test_targets_that_are_observed_have_no_message_to_mix_in(tmp_path):
    with pytest.raises(TargetError, match=r"bootstrap=0\.5 mixes in .* 'regression' targets are given as they are"):
        make("bert_regression", tmp_path, config=BlockLocalConfig(bootstrap=0.5)).train()
