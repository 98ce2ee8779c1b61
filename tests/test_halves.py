"""The two halves of a block's bound are logged apart, as a second look at the messages would compute them."""

from __future__ import annotations

import pytest
import torch
from test_parity import examples
from training import make
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.losses.families import FAMILIES, get_family


OWN_HEADS = BlockLocalConfig(num_blocks=2, head_layers=0)


def halves_by_hand(trainer, batches, family):
    """Run each batch through the cut model as it is, and average `KL(rho || alpha)` and `E_rho[-log beta]`."""
    assembly, seen, count = trainer.assembly, {}, 0
    trainer.model.train()
    for batch, seed in batches:
        targets = assembly.read_targets(batch, seed=seed)
        count += len(targets)

        def leave(block, hidden, routers, targets=targets):
            a_NZ = assembly.heads[block].messages(hidden, targets).forward_NZ
            b_NZ = assembly.heads[block].feedback(targets)[targets.values]
            rho_NZ = get_family(family).posterior(a_NZ, b_NZ)
            seen[block] = seen.get(block, 0) + torch.stack(
                [half_N.sum() for half_N in by_definition(family, a_NZ, b_NZ, rho_NZ)]
            )

        with torch.no_grad(), assembly.step.boundaries.attached(leave):
            trainer.model(**batch)
    return {block: (sums / count).tolist() for block, sums in seen.items()}


def by_definition(family, a_NZ, b_NZ, rho_NZ):
    """Return both halves from textbook divergences, for the families that torch knows."""
    d = torch.distributions
    if family == "gaussian":
        rho, alpha = d.Normal(rho_NZ, 0.5**0.5), d.Normal(a_NZ, 1.0)
        expected_NZ = d.Normal(b_NZ, 1.0).log_prob(rho_NZ) - 1 / 4  # minus half the variance of rho
        return d.kl_divergence(rho, alpha).sum(-1), -expected_NZ.sum(-1)
    if family == "bernoulli":
        rho, alpha = d.Bernoulli(logits=rho_NZ), d.Bernoulli(logits=a_NZ)
        p_NZ, beta = rho.probs, d.Bernoulli(logits=b_NZ)
        one_NZ = torch.ones_like(p_NZ)
        expected_NZ = p_NZ * beta.log_prob(one_NZ) + (1 - p_NZ) * beta.log_prob(0 * one_NZ)
        return d.kl_divergence(rho, alpha).sum(-1), -expected_NZ.sum(-1)
    rho, alpha = d.Categorical(logits=rho_NZ), d.Categorical(logits=a_NZ)
    return d.kl_divergence(rho, alpha), -(rho.probs * b_NZ.log_softmax(-1)).sum(-1)


def batch_of(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize("family", ["gaussian", "bernoulli", "categorical"])
@pytest.mark.parametrize("name", ["bert", "bert_mlm", "t5"])
def test_logs_carry_the_halves_of_the_messages_of_the_batch(name, family, tmp_path):
    rows = examples(SPECIMENS[name])[:4]
    config = BlockLocalConfig(num_blocks=4, feedback="direct", family=family, negatives=20)
    trainer = make(name, tmp_path, rows=rows, config=config, max_steps=1, train_sampling_strategy="sequential")
    expected = halves_by_hand(trainer, [(batch_of(rows), (3, 0, 0, 0))], family)
    trainer.train()
    row = trainer.state.log_history[0]
    for block in range(3):
        found = [row[f"block_{block}/kl"], row[f"block_{block}/nll"]]
        assert found == pytest.approx(expected[block], rel=1e-4, abs=1e-5)
    assert "block_3/kl" not in row


@pytest.mark.parametrize("step_per_block", [False, True])
def test_a_target_counts_once_whatever_micro_batch_it_is_in(step_per_block, tmp_path):
    rows = examples(SPECIMENS["bert_mlm"])[:12]
    rows[2]["labels"] = torch.full_like(rows[2]["labels"], -100)
    for row in rows[4:8]:
        row["labels"] = torch.full_like(row["labels"], -100)  # a whole micro-batch that is skipped
    config = BlockLocalConfig(num_blocks=2, negatives=None, step_per_block=step_per_block, head_layers=0)
    settings = {"gradient_accumulation_steps": 3, "train_sampling_strategy": "sequential"}
    trainer = make("bert_mlm", tmp_path, rows=rows, config=config, max_steps=1, **settings)
    batches = [(batch_of(rows[start : start + 4]), (0,)) for start in (0, 8)]
    ((kl, nll),) = halves_by_hand(trainer, batches, "gaussian").values()
    trainer.train()
    row = trainer.state.log_history[0]
    assert [row["block_0/kl"], row["block_0/nll"]] == pytest.approx([kl, nll], rel=1e-4)
    assert row["skipped_batches"] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_halves_of_a_batch_are_those_of_its_targets_one_by_one_without_gradient(family):
    config, batch = BlockLocalConfig(family=family, latent_dim=12), SPECIMENS["bert"].batch(0)
    assembly = assemble(SPECIMENS["bert"].build(), config, batch)
    head, targets = assembly.heads[0], assembly.read_targets(batch)
    hidden = torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(0))
    messages = head.messages(hidden, targets)
    pairs = zip(messages.forward_NZ, messages.backward_CZ[batch["labels"]], strict=True)
    one_by_one = torch.stack([torch.stack(head.loss.family.halves(a_Z, b_Z)) for a_Z, b_Z in pairs])
    found = head.loss.halves(messages)
    torch.testing.assert_close(found, one_by_one.sum(0))
    assert not found.requires_grad


def test_every_log_starts_anew(tmp_path):
    long = make("bert", tmp_path, config=OWN_HEADS, max_steps=4, logging_steps=2, learning_rate=0.0)
    short = make("bert", tmp_path, config=OWN_HEADS, max_steps=4, logging_steps=1, learning_rate=0.0)
    for trainer in (long, short):
        trainer.train()
    found, steps = ([row["block_0/kl"] for row in t.state.log_history if "loss" in row] for t in (long, short))
    assert found == pytest.approx([(steps[0] + steps[1]) / 2, (steps[2] + steps[3]) / 2])
    assert found[0] != pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("bert_regression", {}),
        ("bert", {"feedback": "label"}),
        ("bert", {"head_layers": 1}),
        ("gpt2", {"head_layers": 1}),
    ]
    + [
        ("bert", {"feedback": "prototype"}),
        ("bert", {"num_blocks": 1}),
        ("bert", {"global_every": 1, "head_layers": 0}),
    ],
)
def test_where_nothing_is_learned_backwards_there_is_nothing_to_split(name, values, tmp_path):
    trainer = make(name, tmp_path, config=BlockLocalConfig(**values))
    trainer.train()
    assert not [key for row in trainer.state.log_history for key in row if key.endswith(("/kl", "/nll"))]


def test_global_steps_have_no_halves_and_change_none(tmp_path):
    rows = examples(SPECIMENS["bert"])
    found = []
    for values, steps in (({}, 1), ({"global_every": 2}, 2)):
        config = BlockLocalConfig(head_layers=0, **values)
        trainer = make("bert", tmp_path, rows=rows, config=config, max_steps=steps, logging_steps=steps)
        trainer.train()
        found.append({key: trainer.state.log_history[0][key] for key in ("block_0/kl", "block_0/nll")})
    assert found[0] == pytest.approx(found[1])


def test_a_custom_loss_does_not_hide_them(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    logs = []
    for custom in (None, loss):
        trainer = make("bert", tmp_path, config=OWN_HEADS, compute_loss_func=custom)
        trainer.train()
        logs.append([row["block_0/kl"] for row in trainer.state.log_history[:-1]])
    assert len(logs[0]) == 3
    assert logs[0] == pytest.approx(logs[1], rel=1e-3)
