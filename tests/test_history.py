"""The history of a run is what it logged and took, once, in order, and survives what runs survive."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_parity import arguments, examples
from transformers import TrainerCallback, TrainerState
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer
from hf_blocklocal.callbacks import DriftCallback, HistoryCallback
from hf_blocklocal.errors import HistoryError
from hf_blocklocal.records.history import (
    HISTORY_NAME,
    BlockOfCut,
    CutRow,
    Evaluation,
    Look,
    Memory,
    StepTime,
    Summary,
    Timeline,
    Training,
    append_row,
    logged,
    read_history,
    resumed,
    write_history,
)


BLOCK = BlockOfCut(0, 1, 10, 2, 0.5, "Contrast", "cpu")
ROWS = [
    CutRow(0, "BertModel", (BLOCK, BlockOfCut(None, None, 3, 0, None, "the model's own loss", "cuda:0"))),
    Training(2, {"loss": 1.5, "block_0/loss": 2.0}),
    StepTime(2, 0.25, 2, 0, "cpu"),
    Memory(2, "cpu", 1 << 30, "resident", 0),
    Evaluation(2, {"eval_loss": 1.0}),
    Look(3, {"drift/block_0": 0.1}),
    Timeline(3, 1, 0.5, 0.75, "forward"),
    Summary(4, {"train_runtime": 3.0}),
]
BERT = SPECIMENS["bert"]


def trainer_in(folder, *, rows=None, blocks=3, **settings):
    rows = examples(BERT) if rows is None else rows
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2} | settings
    return BlockLocalTrainer(
        BERT.build(),
        arguments(folder, **settings),
        train_dataset=rows,
        eval_dataset=rows[:8],
        block_local=BlockLocalConfig(num_blocks=blocks, head_layers=0),
    )


def kinds(rows):
    return [(row.kind, row.step) for row in rows]


def logs_of(rows):
    return [row.values for row in rows if hasattr(row, "values")]


# ---- On disk ----


def test_every_kind_of_row_comes_back_as_it_was(tmp_path):
    write_history(tmp_path / HISTORY_NAME, ROWS[:-1])
    append_row(tmp_path / HISTORY_NAME, ROWS[-1])
    assert read_history(tmp_path / HISTORY_NAME) == ROWS
    assert [path.name for path in tmp_path.iterdir()] == [HISTORY_NAME]


def test_numbers_that_json_has_no_word_for_come_back_as_no_number(tmp_path):
    write_history(tmp_path / HISTORY_NAME, [Training(1, {"loss": math.nan, "grad_norm": math.inf})])
    assert "NaN" not in (tmp_path / HISTORY_NAME).read_text()
    assert all(math.isnan(value) for value in read_history(tmp_path / HISTORY_NAME)[0].values.values())


def test_a_line_that_was_never_finished_is_skipped(tmp_path):
    write_history(tmp_path / HISTORY_NAME, ROWS)
    with (tmp_path / HISTORY_NAME).open("a") as file:
        file.write('{"kind": "training", "st')
    assert read_history(tmp_path / HISTORY_NAME) == ROWS


def test_a_missing_history_says_how_to_get_one(tmp_path):
    with pytest.raises(HistoryError, match=r"There is no .*history.jsonl\. BlockLocalTrainer writes it with"):
        read_history(tmp_path / HISTORY_NAME)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "Line 2 of .* is no JSON .*'no json'. Delete the line"),
        ('{"kind": "training", "step": 1', "Line 2 of .* is no JSON"),
        ('{"kind": "weather", "step": 1}', "Line 2 of .* is of kind 'weather'. Known are .*'training'"),
        ("[1, 2]", "Line 2 of .* is of kind None"),
        ('{"kind": "training", "step": 1}', "Line 2 of .* does not hold what a row of kind 'training' holds"),
        ('{"kind": "training", "step": 1, "values": {"loss": "low"}}', "Line 2 of .* does not hold"),
        ('{"kind": "memory", "step": 1, "device": "cpu"}', "does not hold .*'peak_bytes'"),
        ('{"kind": "timeline", "step": 1, "block": 0, "start": null, "stop": 1}', "does not hold"),
        ('{"kind": "cut", "step": 1, "model": "x", "blocks": [{"first": 0}]}', "does not hold"),
    ],
)
def test_a_line_that_is_no_row_is_named(line, message, tmp_path):
    write_history(tmp_path / HISTORY_NAME, ROWS[:1])
    with (tmp_path / HISTORY_NAME).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(HistoryError, match=message):
        read_history(tmp_path / HISTORY_NAME)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"loss": 1.0, "train_runtime": 2.0}, Training),
        ({"train_runtime": 2.0, "train_loss": 1.0}, Summary),
        ({"eval_loss": 1.0}, Evaluation),
        ({"test_loss": 1.0, "test_runtime": 1.0}, Evaluation),
        ({"probe/block_0": 1.0}, Look),
    ],
)
def test_what_is_logged_is_told_apart_by_its_names(values, kind):
    assert logged(values | {"note": "text", "flag": True, "step": 9}, 7) == kind(7, values)


def test_of_a_resumed_run_nothing_after_the_checkpoint_is_left():
    log = [{"loss": 1.5, "step": 2}, {"eval_loss": 1.0, "step": 2}]
    later = [StepTime(3, 0.1, 1, 0, "cpu"), Training(3, {"loss": 9.0}), Evaluation(2, {"eval_loss": 7.0})]
    assert kinds(resumed([*ROWS[:5], *later], log, 2)) == [
        ("cut", 0),
        ("step_time", 2),
        ("memory", 2),
        ("training", 2),
        ("evaluation", 2),
    ]


# ---- In a run ----


def test_a_run_leaves_what_it_logged_and_what_that_took(tmp_path):
    trainer = trainer_in(tmp_path)
    trainer.add_callback(DriftCallback(trainer, every=2))
    trainer.train()
    trainer.save_state()
    rows = read_history(tmp_path / HISTORY_NAME)
    unheard = ("step", "total_flos")  # the callback that prints takes the second out of what is logged
    stated = [{name: value for name, value in row.items() if name not in unheard} for row in trainer.state.log_history]
    assert logs_of(rows) == stated
    (cut,) = (row for row in rows if isinstance(row, CutRow))
    assert [(block.first, block.last) for block in cut.blocks] == [(0, 0), (1, 1), (2, 3)]
    assert sum(block.parameters for block in cut.blocks) == trainer.model.num_parameters()
    assert [block.device for block in cut.blocks] == ["cpu"] * 3
    assert cut.blocks[0].head > 0 == cut.blocks[2].head
    times = [row for row in rows if isinstance(row, StepTime)]
    assert [(row.step, row.steps) for row in times] == [(1, 1), (2, 1), (3, 1), (4, 1), (4, 4)]
    assert times[-1].seconds == pytest.approx(sum(row.seconds for row in times[:-1]) / 4)
    assert 0 < times[-1].seconds < 60
    peaks = [row.peak_bytes for row in rows if isinstance(row, Memory)]
    assert peaks == sorted(peaks)
    assert peaks[0] > 1 << 20


def test_nothing_is_written_where_nothing_is_saved(tmp_path):
    trainer = trainer_in(tmp_path / "run")
    trainer.train()
    assert list((tmp_path / "run").glob("*")) == []
    trainer.save_model(tmp_path / "else")
    assert list((tmp_path / "run").glob("*")) == []
    assert read_history(tmp_path / "else" / HISTORY_NAME) == trainer.history.rows


def test_where_checkpoints_are_saved_the_file_grows_with_the_run(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(len(read_history(tmp_path / HISTORY_NAME)))

    trainer = trainer_in(tmp_path, save_strategy="steps", save_steps=4)
    trainer.add_callback(Watch())
    trainer.train()
    assert seen == sorted(set(seen))
    trainer.evaluate()
    assert kinds(read_history(tmp_path / HISTORY_NAME))[-1] == ("evaluation", 4)


def test_a_resumed_run_goes_on_where_its_checkpoint_ends(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer_in(tmp_path, **settings).train()
    whole = read_history(tmp_path / HISTORY_NAME)
    again = trainer_in(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    rows = read_history(tmp_path / HISTORY_NAME)
    assert sorted(kinds(rows)) == sorted(kinds(whole))
    assert [row.values["loss"] for row in rows if isinstance(row, Training)] == [
        row.values["loss"] for row in whole if isinstance(row, Training)
    ]


@pytest.mark.parametrize("damage", ["missing", "corrupt"])
def test_a_resumed_run_without_a_history_takes_its_logs_from_the_checkpoint(damage, tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer_in(tmp_path, **settings).train()
    file = tmp_path / HISTORY_NAME
    if damage == "missing":
        file.unlink()
    else:
        file.write_text("nonsense\n" + file.read_text())
    again = trainer_in(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [row.step for row in read_history(file) if isinstance(row, Training)] == [1, 2, 3, 4]
    if damage == "corrupt":
        assert "Line 1 of" in caplog.text
        assert (tmp_path / f"{HISTORY_NAME}.unreadable").read_text().startswith("nonsense")


def test_a_new_run_replaces_the_history_of_an_earlier_one(tmp_path):
    for steps in (4, 2):
        trainer_in(tmp_path, max_steps=steps, save_strategy="steps").train()
    assert [row.step for row in read_history(tmp_path / HISTORY_NAME) if isinstance(row, Training)] == [1, 2]


def test_only_the_first_process_keeps_and_writes(tmp_path):
    trainer = trainer_in(tmp_path)
    callback = HistoryCallback(trainer)
    state = TrainerState(is_world_process_zero=False)
    trainer.args.save_strategy = "steps"
    callback.on_train_begin(trainer.args, state, trainer.control)
    callback.on_log(trainer.args, state, trainer.control, logs={"loss": 1.0})
    callback.on_save(trainer.args, state, trainer.control)
    callback.on_train_end(trainer.args, state, trainer.control)
    assert callback.rows == []
    assert not (tmp_path / HISTORY_NAME).exists()


@pytest.mark.parametrize("blocks", [1, 3])
def test_keeping_a_history_changes_no_bit(blocks, tmp_path):
    states = []
    for kept in (True, False):
        trainer = trainer_in(tmp_path, blocks=blocks)
        if not kept:
            trainer.remove_callback(HistoryCallback)
        trainer.train()
        states.append(trainer.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_every_line_is_json_that_others_can_read(tmp_path):
    trainer = trainer_in(tmp_path, blocks=1)
    trainer.train()
    trainer.save_state()
    lines = (tmp_path / HISTORY_NAME).read_text().splitlines()
    assert {json.loads(line)["kind"] for line in lines} == {
        *("cut", "training", "evaluation", "summary", "step_time", "memory")
    }
