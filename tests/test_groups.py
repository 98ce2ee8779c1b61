"""Blocks have learning rates of their own, in proportion, whatever else a group of the optimizer holds."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_optim import adafactor_relative, adamw, groups_of, three_blocks
from test_parity import equal
from training import make, snapshot, whole_and_resumed
from transformers import AutoConfig, AutoModelForSequenceClassification, TrainerCallback
from transformers.optimization import Adafactor
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig
from hf_blocklocal.anatomy.layers import is_pretrained
from hf_blocklocal.errors import TargetError, UnsupportedSettingError
from hf_blocklocal.optim.groups import factors_by_block, scale_learning_rates_
from hf_blocklocal.teaching.taught_model import name_of_original


def blocks_of(model):
    return [list(block.parameters()) for block in model]


def split(optimizer, factors, has_schedule=False):
    scale_learning_rates_(optimizer, factors, option="block_lr_decay", has_schedule=has_schedule)


def rate_of(optimizer, parameter):
    (group,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    return group["lr"], group["weight_decay"]


def test_the_factor_falls_from_the_last_block_down():
    model = three_blocks()
    factors = factors_by_block(blocks_of(model), 0.5)
    assert [factors[block.weight] for block in model] == [0.25, 0.5, 1.0]


def test_groups_are_split_by_factor_and_keep_what_else_they_hold():
    model = three_blocks()
    optimizer = adamw(groups_of(model))
    split(optimizer, factors_by_block(blocks_of(model), 0.5))
    for block, factor in zip(model, (0.25, 0.5, 1.0), strict=True):
        assert rate_of(optimizer, block.weight) == (0.1 * factor, 0.3)
        assert rate_of(optimizer, block.bias) == (0.1 * factor, 0.0)
    assert optimizer.param_groups[0]["lr"] == 0.1  # the rate that the logs show is the run's


def test_a_group_is_split_only_where_needed():
    model = three_blocks()
    optimizer = adamw(groups_of(model))
    split(optimizer, {model[1].bias: 0.5})
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 2, 1]


def test_equal_factors_split_nothing():
    model = three_blocks()
    optimizer = adamw(groups_of(model))
    before = [dict(group) for group in optimizer.param_groups]
    split(optimizer, factors_by_block(blocks_of(model), 1.0))
    assert optimizer.param_groups == before


def test_splitting_twice_is_splitting_once():
    model = three_blocks()
    optimizer = adamw(groups_of(model))
    for _ in range(2):
        split(optimizer, factors_by_block(blocks_of(model), 0.5))
    assert rate_of(optimizer, model[0].weight)[0] == 0.025


def test_an_optimizer_without_learning_rates_is_refused():
    model = three_blocks()
    with pytest.raises(UnsupportedSettingError, match="Adafactor keeps none in its parameter groups"):
        split(adafactor_relative(groups_of(model)), factors_by_block(blocks_of(model), 0.5))


# ---- Through the Trainer ----


@pytest.mark.parametrize("step_per_block", [False, True])
def test_with_plain_sgd_a_block_moves_in_proportion(step_per_block, tmp_path):
    moves = []
    for decay in (1.0, 0.5):
        config = BlockLocalConfig(num_blocks=4, block_lr_decay=decay, step_per_block=step_per_block)
        settings = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1, "max_grad_norm": 0}
        trainer = make("bert", tmp_path, config=config, lr_scheduler_type="constant", **settings)
        before = snapshot(trainer)
        trainer.train()
        moves.append({key: value - before[key] for key, value in snapshot(trainer).items()})
    names = {parameter: key for key, parameter in trainer.assembly.module.named_parameters()}
    for block, parameters in enumerate(trainer.assembly.parameters):
        for key in (names[parameter] for parameter in parameters):
            torch.testing.assert_close(moves[1][key], 0.5 ** (3 - block) * moves[0][key], rtol=1e-3, atol=1e-6)


def test_a_schedule_keeps_the_proportions_and_the_log_shows_the_rate_of_the_run(tmp_path):
    config = BlockLocalConfig(num_blocks=2, block_lr_decay=0.25)
    trainer = make("bert", tmp_path, config=config, warmup_steps=2, max_steps=6, lr_scheduler_type="cosine")
    plain = make("bert", tmp_path, max_steps=6, warmup_steps=2, lr_scheduler_type="cosine")
    seen = []

    class Note(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            seen.append([group["lr"] for group in optimizer.param_groups])

    trainer.add_callback(Note())
    for run in (trainer, plain):
        run.train()
    assert len({tuple(rates) for rates in seen}) == 5  # 0.0005 comes up and down
    for high, low, same_high, same_low in seen:
        assert high == same_high
        assert low == same_low == pytest.approx(0.25 * high)
    logged = [[row["learning_rate"] for row in run.state.log_history if "loss" in row] for run in (trainer, plain)]
    assert logged[0] == logged[1]


@pytest.mark.parametrize("step_per_block", [False, True])
def test_a_killed_run_resumes_to_the_bit(step_per_block, tmp_path):
    config = BlockLocalConfig(num_blocks=4, block_lr_decay=0.3, step_per_block=step_per_block)
    saving = {"config": config, "max_steps": 9, "save_steps": 4}
    whole, resumed = whole_and_resumed(tmp_path, killed_after=6, **saving)
    assert equal(snapshot(whole), snapshot(resumed))
    optimizers = [tmp_path / name / "checkpoint-9" / "optimizer.pt" for name in ("whole", "killed")]
    assert optimizers[0].read_bytes() == optimizers[1].read_bytes()


def test_a_second_call_of_train_does_not_shrink_the_rates_again(tmp_path):
    trainer = make("bert", tmp_path, config=BlockLocalConfig(block_lr_decay=0.5), lr_scheduler_type="constant")
    for _ in range(2):
        trainer.train()
    assert sorted({group["lr"] for group in trainer.optimizer.param_groups}) == [5e-4, 1e-3]


def test_an_optimizer_of_ones_own_has_its_rates_multiplied(tmp_path):
    model = SPECIMENS["bert"].build()
    config = BlockLocalConfig(num_blocks=2, block_lr_decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    trainer = make("bert", tmp_path, model=model, optimizers=(optimizer, None), config=config)
    trainer.create_optimizer()
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert {rates[parameter] for parameter in trainer.assembly.parameters[0]} == {0.1}
    assert {rates[parameter] for parameter in trainer.assembly.parameters[1]} == {0.2}


def test_a_scheduler_of_ones_own_is_refused(tmp_path):
    model = SPECIMENS["bert"].build()
    trainer = make("bert", tmp_path, model=model, config=BlockLocalConfig(block_lr_decay=0.5))
    optimizer = torch.optim.SGD(trainer.assembly.module.parameters(), lr=0.2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer.optimizer, trainer.lr_scheduler = optimizer, scheduler
    with pytest.raises(UnsupportedSettingError, match="block_lr_decay splits the groups .* lr_scheduler_type"):
        trainer.train()


def pretrained(name, folder):
    """Return a model as users have it: read from a checkpoint."""
    model = SPECIMENS[name].build()
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def factors_of(trainer):
    """Return the rate of every trained parameter, by name, as a share of the run's."""
    rates, named = rates_of(trainer.create_optimizer()), trainer.assembly.module.named_parameters()
    return {name: rates[parameter] / trainer.args.learning_rate for name, parameter in named if parameter in rates}


def test_the_lowest_block_of_a_pretrained_model_has_less_than_a_third_of_the_rate(tmp_path):
    model = pretrained("bert", tmp_path)
    factors = factors_of(make("bert", tmp_path, model=model, blocks=4))
    assert factors["model.bert.encoder.layer.0.output.dense.weight"] == pytest.approx(0.3, abs=1e-3)
    assert factors["model.bert.encoder.layer.1.output.dense.weight"] == pytest.approx(0.3 ** (2 / 3), abs=1e-3)
    assert factors["model.bert.encoder.layer.3.output.dense.weight"] == factors["model.classifier.weight"] == 1
    chosen = BlockLocalConfig(num_blocks=4, block_lr_decay=1.0)
    assert set(factors_of(make("bert", tmp_path, model=model, config=chosen)).values()) == {1.0}
    assert set(factors_of(make("bert", tmp_path, model=model, blocks=1)).values()) == {1.0}


def test_a_model_from_scratch_and_one_with_adapters_have_one_rate(tmp_path):
    assert set(factors_of(make("bert", tmp_path, blocks=4)).values()) == {1.0}
    adapted = get_peft_model(pretrained("bert", tmp_path), LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    assert set(factors_of(make("bert", tmp_path, model=adapted, blocks=2)).values()) == {1.0}


def test_what_is_pretrained_is_told_by_weights_that_were_read_not_by_the_config(tmp_path):
    read = pretrained("bert", tmp_path)
    assert is_pretrained(read)
    assert is_pretrained(copy.deepcopy(read))
    named = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tmp_path))
    assert named.config._name_or_path == str(tmp_path)
    assert not is_pretrained(named)
    assert set(factors_of(make("bert", tmp_path, model=named, blocks=4)).values()) == {1.0}
    inside = torch.nn.Module()
    inside.encoder = read.bert
    assert is_pretrained(inside)


def test_the_cut_that_is_described_shows_the_rates(tmp_path):
    table = make("bert", tmp_path, model=pretrained("bert", tmp_path), blocks=2).assembly.describe().splitlines()
    column = table[0].index("rate")
    assert [line[column : column + 4] for line in table] == ["rate", "0.30", "1.00"]
    assert "rate" not in make("bert", tmp_path, blocks=2).assembly.describe()


def test_heads_have_the_rate_of_the_run_and_copies_that_of_their_originals(tmp_path):
    model = pretrained("llama", tmp_path)
    config = BlockLocalConfig(num_blocks=4, block_lr_decay=0.5, head_copies="trained", head_lens=True)
    factors = factors_of(make("llama", tmp_path, model=model, config=config))
    copies = {name: name_of_original(name) for name in factors if ".loan." in name}
    assert {factors[original] for original in copies.values()} == {0.25, 0.5, 1.0}
    assert all(factors[name] == factors[original] for name, original in copies.items())
    assert {factors[name] for name in factors if ".lens." in name} == {1.0}


def test_where_a_schedule_is_given_a_pretrained_model_has_one_rate_and_a_warning_says_so(tmp_path, caplog):
    model = pretrained("bert", tmp_path)
    trainer = make("bert", tmp_path, model=model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    trainer.optimizer = optimizer
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer.train()
    assert "because SGD came with a schedule for its groups as they are" in caplog.text
    assert len({group["lr"] for group in optimizer.param_groups}) == 1
    assert "rate" not in trainer.assembly.describe()
    trainer.save_model(tmp_path / "end")
    assert BlockLocalConfig.from_pretrained(tmp_path / "end").block_lr_decay == 1.0


def test_where_an_optimizer_has_no_rates_and_nobody_asks_a_warning_says_so(caplog):
    model = three_blocks()
    optimizer = adafactor_relative(groups_of(model))
    before = list(optimizer.param_groups)
    scale_learning_rates_(optimizer, factors_by_block(blocks_of(model), 0.5), option="", has_schedule=False)
    assert "because Adafactor keeps no rate in its groups" in caplog.text
    assert optimizer.param_groups == before


def test_a_run_goes_on_at_the_rates_that_it_had(tmp_path, caplog):
    model = pretrained("bert", tmp_path / "start")
    make("bert", tmp_path / "run", model=model, max_steps=2, save_strategy="steps", save_steps=2).train()
    trainer = make("bert", tmp_path / "run", max_steps=4)  # of the same shape, and from scratch
    trainer.train(resume_from_checkpoint=True)
    assert "Blocks learn at the rates of the run" in caplog.text
    assert trainer.assembly.config.block_lr_decay == 0.3
    assert len(trainer.optimizer.param_groups) == 4


def test_adafactor_with_a_rate_is_split():
    model = three_blocks()
    optimizer = Adafactor(groups_of(model), lr=0.1, relative_step=False)
    split(optimizer, factors_by_block(blocks_of(model), 0.5))
    assert rate_of(optimizer, model[0].weight)[0] == 0.025


# ---- The feedback networks ----


def feedback_of(trainer):
    return {parameter for head in trainer.assembly.heads for parameter in head.feedback.parameters()}


def rates_of(optimizer):
    return {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}


def test_a_rate_of_its_own_replaces_the_factor_and_comes_last():
    model = three_blocks()
    optimizer = adamw(groups_of(model))
    factors = factors_by_block(blocks_of(model), 0.5)
    scale_learning_rates_(optimizer, factors, rates={model[0].weight: 7.0}, option="both", has_schedule=False)
    assert rate_of(optimizer, model[0].weight) == (7.0, 0.3)
    assert rate_of(optimizer, model[0].bias) == (0.025, 0.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05, 7.0, 0.1, 0.05, 0.025]


@pytest.mark.parametrize("rate", [2e-4, 0.5])
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_feedback_networks_have_the_rate_asked_for_and_the_schedule_of_the_run(rate, decay, tmp_path):
    config = BlockLocalConfig(num_blocks=4, feedback_learning_rate=rate, block_lr_decay=decay)
    trainer = make("bert", tmp_path, config=config, warmup_steps=2, max_steps=6, lr_scheduler_type="cosine")
    seen = []

    class Note(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates, feedback = rates_of(optimizer), feedback_of(trainer)
            share = rates[trainer.model.classifier.weight] / args.learning_rate
            assert [rates[parameter] for parameter in feedback] == pytest.approx([rate * share] * 3)
            (readout,) = {rates[p] for p in trainer.assembly.heads[1].readout.parameters()}
            assert readout == pytest.approx(args.learning_rate * share)
            lowest = rates[trainer.model.bert.encoder.layer[0].output.dense.weight]
            assert lowest == pytest.approx(decay**3 * args.learning_rate * share)
            seen.append(share)

    trainer.add_callback(Note())
    trainer.train()
    assert len(set(seen)) == 5
    logged = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    assert max(logged) == pytest.approx(trainer.args.learning_rate)


@pytest.mark.parametrize("step_per_block", [False, True])
def test_only_the_feedback_networks_move_otherwise(step_per_block, tmp_path):
    moves = []
    for rate in (None, 0.3):
        config = BlockLocalConfig(
            num_blocks=4, feedback_learning_rate=rate, step_per_block=step_per_block, head_layers=0
        )
        settings = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1, "max_grad_norm": 0}
        trainer = make("bert", tmp_path, config=config, lr_scheduler_type="constant", **settings)
        before = snapshot(trainer)
        trainer.train()
        moves.append({key: value - before[key] for key, value in snapshot(trainer).items()})
    names = [key for key in moves[0] if ".feedback." in key]
    assert len(names) == 3
    for key in names:
        assert moves[0][key].abs().max() > 0
        torch.testing.assert_close(moves[1][key], 3 * moves[0][key], rtol=1e-3, atol=1e-6)
    rest = [{key: move for key, move in found.items() if key not in names} for found in moves]
    assert equal(*rest)


@pytest.mark.parametrize("step_per_block", [False, True])
def test_a_killed_run_with_a_rate_for_feedback_resumes_to_the_bit(step_per_block, tmp_path):
    config = BlockLocalConfig(num_blocks=4, feedback_learning_rate=0.01, step_per_block=step_per_block)
    whole, resumed = whole_and_resumed(tmp_path, killed_after=6, config=config, max_steps=9, save_steps=4)
    assert equal(snapshot(whole), snapshot(resumed))
    optimizers = [tmp_path / name / "checkpoint-9" / "optimizer.pt" for name in ("whole", "killed")]
    assert optimizers[0].read_bytes() == optimizers[1].read_bytes()


def test_the_rate_of_feedback_is_absolute_in_an_optimizer_of_ones_own(tmp_path):
    model = SPECIMENS["bert"].build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    config = BlockLocalConfig(feedback_learning_rate=0.03)
    trainer = make("bert", tmp_path, model=model, optimizers=(optimizer, None), config=config)
    trainer.create_optimizer()
    rates, feedback = rates_of(optimizer), feedback_of(trainer)
    assert {rates[parameter] for parameter in feedback} == {0.03}
    assert {rate for parameter, rate in rates.items() if parameter not in feedback} == {0.2}


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"feedback_learning_rate": 0.1}, "feedback_learning_rate"),
        ({"block_lr_decay": 0.5}, "block_lr_decay"),
        ({"block_lr_decay": 0.5, "feedback_learning_rate": 0.1}, "block_lr_decay with feedback_learning_rate"),
    ],
)
def test_an_optimizer_without_rates_is_refused_by_the_name_of_the_option(values, option, tmp_path):
    trainer = make("bert", tmp_path, config=BlockLocalConfig(**values), optim="adafactor")
    trainer.optimizer = adafactor_relative(groups_of(trainer.model))
    with pytest.raises(UnsupportedSettingError, match=f"^{option} changes .* or leave {option} out"):
        trainer.train()


@pytest.mark.parametrize(("name", "feedback"), [("bert", "label"), ("bert_regression", "auto")])
def test_a_rate_for_networks_that_learn_nothing_is_refused(name, feedback, tmp_path):
    config = BlockLocalConfig(feedback=feedback, feedback_learning_rate=0.1)
    with pytest.raises(TargetError, match=r"feedback_learning_rate=0.1 is for .* Leave it out, or use a feedback"):
        make(name, tmp_path, config=config).train()
