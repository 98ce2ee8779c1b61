"""Heads train copies of the layers above: each its own, with its block, and nothing of them is left afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_optim import three_blocks
from test_parity import arguments, equal, examples
from training import make, snapshot
from transformers import Trainer
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.borrowing.copies import Copies
from hf_blocklocal.borrowing.loans import Loan
from hf_blocklocal.checkpoint import HEADS_NAME, load_heads_, save_heads
from hf_blocklocal.config.defaults import settled
from hf_blocklocal.errors import ConfigError, CopiesMismatchError


LENT = [{"1.weight", "2.weight"}, {"2.weight"}]
ALONE = {"head_copies": "trained", "head_refresh_steps": 0}


def learning_of(trainer, block):
    return {name: copy.detach().clone() for name, copy in trainer.assembly.copies.learning[block].items()}


# ---- What trained copies are for ----


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_a_block_that_trains_copies_of_all_above_learns_what_backpropagation_teaches_it(name, tmp_path):
    settings = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 5, "max_grad_norm": 0}
    tied = {"negatives": None, "tied_weights": "untie"} if name == "gpt2" else {}
    config = BlockLocalConfig(num_blocks=2, head_layers=4, **tied, **ALONE)
    ours = make(name, tmp_path / "ours", config=config, **settings)
    plain_model = SPECIMENS[name].build()
    if tied:
        plain_model.lm_head.weight = torch.nn.Parameter(plain_model.lm_head.weight.detach().clone())
    plain = Trainer(plain_model, arguments(tmp_path / "plain", **settings), train_dataset=examples(SPECIMENS[name]))
    ours.train()
    plain.train()
    expected = dict(plain.model.named_parameters())
    mine = {id(parameter) for parameter in ours.assembly.parameters[0]}
    own = {key: p for key, p in ours.model.named_parameters() if id(p) in mine}
    assert own
    for key, parameter in {**own, **learning_of(ours, 0)}.items():
        torch.testing.assert_close(parameter.detach(), expected[key].detach(), rtol=1e-4, atol=1e-5)
    start = dict(SPECIMENS[name].build().named_parameters())
    assert not any(torch.equal(parameter, start[key]) for key, parameter in own.items() if "key.bias" not in key)


def test_no_gradient_of_a_head_reaches_the_layers_that_it_has_copied(borrow):
    model, batch = borrow("bert"), SPECIMENS["bert"].batch(0)
    assembly = assemble(model, BlockLocalConfig(num_blocks=3, head_layers=1, **ALONE), batch)
    assembly.begin_step(0)
    names = {parameter: name for name, parameter in assembly.module.named_parameters()}
    for block in range(2):
        current = []

        def backward(loss, block=block, current=current):
            if len(current) == block:
                loss.backward()

        targets = assembly.read_targets(batch)
        learned = lambda *done, current=current: current.append(done)  # noqa: E731
        with assembly.step.teach(targets, scale=1.0, inputs=batch, backward=backward, learned=learned):
            model(**batch)
        reached = {name for parameter, name in names.items() if parameter.grad is not None}
        mine = {names[parameter] for parameter in assembly.parameters[block]}
        assert reached <= mine
        assert {name for name in reached if name.startswith(f"heads.{block}.loan.")} == {
            f"heads.{block}.loan.{name}" for name in assembly.copies.learning[block]
        }
        assembly.module.zero_grad()


def test_heads_of_several_blocks_train_copies_of_the_same_layer_apart(tmp_path):
    config = BlockLocalConfig(num_blocks=3, head_layers=1, **ALONE)
    trainer = make("bert", tmp_path, config=config, optim="sgd", learning_rate=0.1)
    trainer.train()
    first, second = (learning_of(trainer, block) for block in range(2))
    assert first.keys() == second.keys()
    live = dict(trainer.model.named_parameters())
    for one, other in ((first, second), (first, live), (second, live)):
        assert any(not torch.equal(one[name], other[name]) for name in first)


def test_layers_that_a_head_bypasses_are_not_trained():
    specimen = SPECIMENS["bert"]
    config = BlockLocalConfig(num_blocks=2, boundaries=(1,), head_layers=1, head_bypass="straight_through", **ALONE)
    copies = assemble(specimen.build(), config, specimen.batch(0)).copies
    assert {name.split(".")[3] for name in copies.learning[0] if ".layer." in name} == {"3"}
    assert {name.split(".")[3] for name in copies._copies if ".layer." in name} == {"1", "2"}


# ---- Refreshing them ----


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_refresh_goes_a_part_of_the_way_from_what_a_copy_has_learned(decay):
    model = three_blocks()
    copies = Copies(model, LENT, every=2, lag=1, decay=decay, learns=LENT)
    live = {name: model.get_parameter(name).detach().clone() for name in LENT[0]}
    copies.advance_(0)
    for block, learning in enumerate(copies.learning):
        assert learning.keys() == LENT[block]
        for name, copy in learning.items():
            assert torch.equal(copy, live[name])
            copy.data.add_(1.0 + block)
    copies.advance_(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    copies.advance_(2)
    for block, learning in enumerate(copies.learning):
        for name, copy in learning.items():
            expected = decay * (live[name] + 1.0 + block) + (1 - decay) * live[name]
            torch.testing.assert_close(copy.detach(), expected)


def test_what_is_not_trained_is_copied_once_for_all_heads():
    model = three_blocks()
    copies = Copies(model, LENT, every=2, learns=[{"1.weight"}, {"2.weight"}])
    assert [set(learning) for learning in copies.learning] == [{"1.weight"}, {"2.weight"}]
    assert set(copies._copies) == {"2.weight"}
    with copies.in_use(0):
        assert model[1].weight is copies.learning[0]["1.weight"]
        assert model[2].weight is copies._copies["2.weight"]
    with copies.in_use(1):
        assert model[2].weight is copies.learning[1]["2.weight"]
    assert model[2].weight.requires_grad


# ---- Where they are ----


def test_optimizers_see_a_loan_and_state_dicts_do_not():
    loan = Loan({"a.b.weight": torch.nn.Parameter(torch.ones(2)), "c": torch.nn.Parameter(torch.ones(1))})
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), loan)
    assert [name for name, _ in loan.named_parameters()] == ["c", "a.b.weight"]
    assert list(module.state_dict()) == ["0.weight", "0.bias"]
    module.load_state_dict(module.state_dict())


def test_heads_are_saved_without_what_they_train_of_the_model(tmp_path):
    specimen = SPECIMENS["bert"]
    config = BlockLocalConfig(num_blocks=2, head_layers=1, head_lens=True, **ALONE)
    assembly = assemble(specimen.build(), config, specimen.batch(0))
    save_heads(tmp_path, heads=assembly.heads.state_dict(), cut=assembly.cut)
    live = assemble(specimen.build(), BlockLocalConfig(num_blocks=2, head_layers=1, head_lens=True), specimen.batch(0))
    load_heads_(live.heads, tmp_path, cut=live.cut)
    assert (tmp_path / HEADS_NAME).is_file()


def test_copies_decay_as_what_they_are_copies_of(tmp_path):
    config = BlockLocalConfig(num_blocks=2, head_layers=1, **ALONE)
    trainer = make("bert", tmp_path, config=config, weight_decay=0.1)
    trainer.create_optimizer()
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    live = dict(trainer.model.named_parameters())
    found = set()
    for name, copy in trainer.assembly.copies.learning[0].items():
        assert decays[id(copy)] == decays[id(live[name])], name
        found.add(decays[id(copy)])
    assert found == {0.0, 0.1}


def test_the_table_of_blocks_counts_what_heads_train_as_work_and_not_as_parameters():
    specimen = SPECIMENS["bert"]
    assembly = assemble(specimen.build(), BlockLocalConfig(num_blocks=2, head_layers=1, **ALONE), specimen.batch(0))
    assert assembly.describe().splitlines()[1].split()[3] == "0"
    frozen = BlockLocalConfig(num_blocks=2, head_layers=1, head_copies="frozen", head_refresh_steps=0)
    still = assemble(specimen.build(), frozen, specimen.batch(0))
    assert assembly.head_costs[0] > 1.2 * still.head_costs[0]


def test_stepping_at_once_changes_no_bit_of_them(tmp_path):
    runs = []
    for step_per_block in (False, True):
        config = BlockLocalConfig(
            num_blocks=2, head_copies="trained", head_refresh_steps=2, step_per_block=step_per_block
        )
        runs.append(make("bert", tmp_path / str(step_per_block), config=config, max_steps=5))
        runs[-1].train()
    assert equal(*map(snapshot, runs))
    assert equal(*(learning_of(run, 0) for run in runs))


def test_in_a_warmup_copies_learn_and_the_block_below_them_does_not(tmp_path):
    config = BlockLocalConfig(num_blocks=2, head_warmup_steps=3, **ALONE)
    trainer = make("bert", tmp_path, config=config, max_steps=3)
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    lower = [parameter for parameter in trainer.assembly.parameters[0] if parameter in names]
    before, start = [parameter.detach().clone() for parameter in lower], learning_of(trainer, 0)
    trainer.train()
    assert all(map(torch.equal, before, lower))
    assert not equal(start, learning_of(trainer, 0))


def test_an_optimizer_of_the_users_own_steps_copies_as_their_originals(tmp_path):
    model = SPECIMENS["bert"].build()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "lr": 1e-4, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 1e-5, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    config = BlockLocalConfig(num_blocks=2, **ALONE)
    trainer = make("bert", tmp_path, model=model, config=config, optimizers=(optimizer, schedule))
    trainer.train()
    assert len(optimizer.param_groups) == 2
    for copy, original in trainer.assembly.originals.items():
        (group,) = (group for group in optimizer.param_groups if any(p is copy for p in group["params"]))
        assert any(parameter is original for parameter in group["params"])
        assert group["lr"] == (1e-4 if copy.dim() > 1 else 1e-5)


def test_copies_take_no_memory_until_it_is_known_which_block_is_here():
    model = three_blocks()
    copies = Copies(model, LENT, every=2, learns=[{"1.weight"}, {"2.weight"}], of_all=False)
    live = {name: model.get_parameter(name).data_ptr() for name in LENT[0]}
    everything = [*copies.learning[0].items(), *copies.learning[1].items(), *copies._copies.items()]
    assert all(copy.data_ptr() == live[name] for name, copy in everything)
    copies.of_block(0, exchange=None)
    assert copies.learning[1] == {}
    assert all(copy.data_ptr() != live[name] for name, copy in [*copies.learning[0].items(), *copies._copies.items()])


# ---- Checkpoints ----


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_after_the_best_model_is_loaded_heads_borrow_what_they_did_then(name, tmp_path):
    config = BlockLocalConfig(num_blocks=2, head_copies="trained")
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    rows = examples(SPECIMENS[name])
    trainer = make(name, tmp_path, config=config, eval_dataset=rows, max_steps=5, learning_rate=0.05, **best)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "eval_block_0_loss" in entry]
    then = max(history, key=lambda entry: entry["eval_loss"])
    assert then["step"] < 5
    now = trainer.evaluate()
    assert now["eval_loss"] == then["eval_loss"]
    assert now["eval_block_0_loss"] == then["eval_block_0_loss"]


def test_a_run_without_copies_does_not_go_on_from_a_checkpoint_with_trained_ones(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    make("bert", tmp_path / "trained", config=BlockLocalConfig(num_blocks=2, **ALONE), **saving).train()
    asked = BlockLocalConfig(num_blocks=2, head_refresh_steps=1)
    live = make("bert", tmp_path / "live", config=asked, max_steps=6)
    before = snapshot(live)
    with pytest.raises(CopiesMismatchError, match="have trained copies .* Resume with head_copies='trained'"):
        live.train(resume_from_checkpoint=str(tmp_path / "trained" / "checkpoint-3"))
    assert equal(before, snapshot(live))
    frozen = BlockLocalConfig(num_blocks=2, head_copies="frozen", head_refresh_steps=2)
    make("bert", tmp_path / "frozen", config=frozen, **saving).train()
    live.train(resume_from_checkpoint=str(tmp_path / "frozen" / "checkpoint-3"))
    assert live.state.global_step == 6


@pytest.mark.parametrize(("name", "tied"), [("bert", "add"), ("gpt2", "untie"), ("t5", "freeze")])
@pytest.mark.parametrize("kind", ["trained", "frozen"])
def test_a_run_that_says_nothing_of_copies_borrows_as_the_one_that_it_goes_on_from(name, tied, kind, tmp_path):
    # As block-parallel runs settle it, which one process goes on from.
    copied = BlockLocalConfig(num_blocks=2, head_layers=1, head_bypass="skip", head_copies=kind, head_refresh_steps=2)
    copied = replace(copied, tied_weights=tied)
    whole = make(name, tmp_path / "whole", config=copied, max_steps=6)
    whole.train()
    make(name, tmp_path / "half", config=copied, max_steps=6, save_strategy="steps", save_steps=3).train()
    resumed = make(name, tmp_path / "resumed", config=BlockLocalConfig(num_blocks=2), max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-3"))
    assert resumed.assembly.config.head_copies == kind
    assert equal(snapshot(whole), snapshot(resumed))


def test_a_card_says_that_heads_have_used_copies_of_their_own(tmp_path):
    config = BlockLocalConfig(num_blocks=2, head_layers=1, head_copies="trained", head_refresh_steps=2)
    said = "copies of the layers above it that it had trained itself"
    for name, options, expected in (("trained", {}, True), ("frozen", {"head_copies": "frozen"}, False)):
        data = examples(SPECIMENS["bert"])
        trainer = make("bert", tmp_path / name, config=replace(config, **options), eval_dataset=data)
        trainer.train()
        trainer.evaluate()
        trainer.create_model_card()
        assert (said in (tmp_path / name / "README.md").read_text(encoding="utf-8")) == expected
        assert ("through its own copies of layers 3" in trainer.assembly.describe()) == expected


# ---- Settings ----


def test_where_blocks_are_apart_copies_are_trained_late_and_half_refreshed():
    apart = settled(BlockLocalConfig(num_blocks=4, block_parallel_size=4), single_stack=True)
    assert (apart.head_copies, apart.head_refresh_steps, apart.head_refresh_lag) == ("trained", 10, 2)
    assert apart.head_refresh_decay == 0.5
    asked = settled(BlockLocalConfig(num_blocks=4, head_copies="trained"), single_stack=True)
    for name in ("head_refresh_steps", "head_refresh_lag", "head_refresh_decay", "head_layers"):
        assert getattr(asked, name) == getattr(apart, name)


def test_frozen_copies_are_refreshed_in_full():
    config = BlockLocalConfig(num_blocks=2, block_parallel_size=2, head_copies="frozen")
    assert settled(config, single_stack=True).head_refresh_decay == 0.0


def test_live_layers_leave_open_what_copies_would_be():
    assert settled(BlockLocalConfig(num_blocks=4), single_stack=True).head_copies == "auto"


@pytest.mark.parametrize(
    ("setting", "lends", "reason"),
    [
        ({"head_layers": 0}, True, "head_layers=0"),
        ({"feedback": "direct"}, True, "feedback='direct' asks for heads of their own"),
        ({}, False, "this model cannot lend layers"),
    ],
)
def test_copies_of_nothing_cannot_be_trained(setting, lends, reason):
    with pytest.raises(ConfigError, match=f"here they borrow none: {reason}"):
        settled(BlockLocalConfig(head_copies="trained", **setting), single_stack=True, lends=lends)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"head_refresh_steps": 20}, ("trained", 20, 2, 0.5)),
        ({"head_refresh_lag": 5}, ("trained", 10, 5, 0.5)),
        ({"head_refresh_decay": 0.9}, ("trained", 10, 2, 0.9)),
        ({"head_refresh_steps": 0}, ("trained", 0, 0, 0.0)),
        ({"head_copies": "frozen"}, ("frozen", 10, 2, 0.0)),
        ({"head_copies": "frozen", "head_refresh_steps": 1, "head_refresh_lag": 0}, ("frozen", 1, 0, 0.0)),
    ],
)
@pytest.mark.parametrize("apart", [{}, {"block_parallel_size": 4}])
def test_each_field_that_is_left_open_is_settled_by_itself(setting, expected, apart):
    config = settled(BlockLocalConfig(num_blocks=4, **setting, **apart), single_stack=True)
    fields = ("head_copies", "head_refresh_steps", "head_refresh_lag", "head_refresh_decay")
    assert tuple(getattr(config, name) for name in fields) == expected
    assert settled(config, single_stack=True) == config


@pytest.mark.parametrize(
    ("setting", "bypass", "steps"),
    [
        ({"head_copies": "trained"}, "skip", 0),
        ({"head_copies": "trained", "head_bypass": "straight_through"}, "straight_through", 10),
        ({"head_copies": "frozen"}, "skip", 10),
        ({"block_parallel_size": 4}, "skip", 0),
        ({}, "straight_through", None),
    ],
)
def test_copies_of_a_decoder_that_is_shortened_keep_what_they_learn(setting, bypass, steps):
    config = settled(BlockLocalConfig(num_blocks=4, **setting), single_stack=False)
    assert (config.head_bypass, config.head_refresh_steps) == (bypass, steps)
