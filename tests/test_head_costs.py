"""What a head costs beside its block is counted as training counts it, printed, and warned of."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

import pytest
import torch
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.planning.head_costs import head_operations


def assembled(name, batch=None, **values):
    model = SPECIMENS[name].build()
    batch = SPECIMENS[name].batch(0) if batch is None else batch
    return assemble(model, BlockLocalConfig(**values), batch), batch


def operations_of(assembly, batch):
    return head_operations(assembly.module.model, assembly.step, batch, assembly.read_targets(batch))


@pytest.mark.parametrize("head_layers", [1, 2])
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_borrowed_layer_costs_two_thirds_of_one_that_is_trained(name, head_layers):
    assembly, _ = assembled(name, head_layers=head_layers)
    # The block has two layers. The rest is embeddings and the task head.
    assert assembly.head_costs[0] == pytest.approx(head_layers / 2 * 2 / 3, abs=0.05)


def test_a_lens_costs_three_products():
    (plain, batch), (with_lens, _) = (assembled("bert", head_layers=1, head_lens=lens) for lens in (False, True))
    width, tokens = 16, batch["input_ids"].numel()
    more = operations_of(with_lens, batch)[0] - operations_of(plain, batch)[0]
    assert more == 3 * 2 * tokens * width * width


def test_a_reconstruction_costs_three_products():
    (plain, batch), (with_decoder, _) = (assembled("bert", head_layers=1, reconstruction=c) for c in (0.0, 1.0))
    width, tokens = 16, batch["input_ids"].numel()
    more = operations_of(with_decoder, batch)[0] - operations_of(plain, batch)[0]
    assert more == 3 * 2 * tokens * width * width


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_the_benchmark_counts_the_same(name, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts" / "benchmarks"))
    share = importlib.import_module("feedback_share")
    assembly, batch = assembled(name, num_blocks=3, head_layers=0)
    targets = assembly.read_targets(batch)
    whole, bare = (share.operations(assembly, batch, targets, with_heads=with_heads) for with_heads in (True, False))
    assembly.module.zero_grad()
    assert sum(operations_of(assembly, batch)) == whole - bare > 0


@pytest.mark.parametrize("name", ["gpt2", "bert_mlm"])
def test_what_is_done_once_per_step_does_not_count(name):
    assembly, batch = assembled(name, num_blocks=4, head_layers=0, negatives=None)
    doubled = {key: torch.cat([value, value]) for key, value in batch.items()}
    assert operations_of(assembly, doubled) == [2 * count for count in operations_of(assembly, batch)]


@pytest.mark.parametrize(
    "values", [{"head_layers": 0}, {"head_layers": 2}, {"head_lens": True}, {"feedback": "chained"}]
)
def test_counting_leaves_nothing_behind(values):
    assembly, _ = assembled("gpt2", num_blocks=4, **values)
    assert all(parameter.grad is None for parameter in assembly.module.parameters())
    assert all(parameter.requires_grad for parameter in assembly.module.parameters())
    assert assembly.module.model.training == SPECIMENS["gpt2"].build().training
    assert len(assembly.head_costs) == 3


def test_heavy_heads_are_named_once(caplog):
    with caplog.at_level(logging.WARNING, logger="hf_blocklocal"):
        assembly, _ = assembled("bert", boundaries=(3,), head_layers=0, latent_dim=1)
        assert not caplog.records
        assert assembly.head_costs[0] < 0.01
        assert " <1% " in assembly.describe()
        assembly, _ = assembled("bert", boundaries=(3,), head_layers=1)
    assert [record.getMessage()[:96] for record in caplog.records] == [
        "The heads of these blocks cost more than 10% of the operations of their block: 0 (22%). Fewer an"
    ]
    assert assembly.describe().splitlines()[1].split() == [
        *("0", "0-2", "8,784", "0", "22%"),
        *("LabelFeedback,", "Agreement", "(categorical)", "through", "layers", "3", "(all", "above)"),
    ]


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"head_layers": 1}, "make them lighter."),
        ({"head_layers": 2}, "make them lighter, and so do fewer head_layers than 2."),
        ({"head_bypass": "straight_through"}, "make them lighter, and so does head_bypass='skip'."),
        ({"feedback": "direct", "latent_dim": 999}, "make them lighter, and so does a latent_dim below 999."),
    ],
)
def test_advice_is_of_what_is_in_force(values, advice, caplog):
    assembled("bert", **values)
    (said,) = [record.getMessage() for record in caplog.records if "cost more than" in record.getMessage()]
    assert said.endswith(advice)


def test_a_batch_without_targets_leaves_the_cost_open():
    batch = SPECIMENS["bert"].batch(0)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assembly, _ = assembled("bert", batch)
    assert assembly.head_costs == ()
    assert len(assembly.describe().splitlines()) == 3
