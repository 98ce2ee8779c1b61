"""A model card says what its run says, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from carding import (
    BERT,
    FACTS,
    METRICS,
    PLACEHOLDER,
    accuracy,
    finished_run,
    lines_of,
    metadata,
    section,
    trainer_in,
)
from test_parity import arguments, examples
from transformers import Trainer, TrainingArguments

from hf_blocklocal import BlockLocalConfig
from hf_blocklocal.callbacks import ModelCardCallback
from hf_blocklocal.callbacks.model_card import changed_arguments
from hf_blocklocal.card import (
    RunResult,
    baseline_of,
    render,
)
from hf_blocklocal.card.tables import NO_BASELINE, duration
from hf_blocklocal.errors import CardError
from hf_blocklocal.feedback import FEEDBACK
from hf_blocklocal.losses import LOSSES
from hf_blocklocal.records.history import Memory, StepTime
from hf_blocklocal.teaching.describing import sizes, taught_by


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run that is finished and saved, and its trainer."""
    return finished_run(tmp_path_factory.mktemp("tiny-reviews"))


# ---- What it says ----


def test_a_card_of_a_run_has_metadata_that_the_client_takes_and_no_placeholder(run):
    trainer, folder = run
    data = metadata(folder / "README.md")
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["block-local", "hf_blocklocal"],
    }
    text = (folder / "README.md").read_text()
    assert not PLACEHOLDER.search(text), PLACEHOLDER.search(text)
    assert f"# {folder.name}" in text


def test_the_quick_start_of_a_card_runs_without_this_package(run):
    code = re.search(r"```python\n(.*?)```", (run[1] / "README.md").read_text(), flags=re.DOTALL)[1]
    code = "import sys; sys.modules['hf_blocklocal'] = None\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=run[1], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "LABEL_" in done.stdout


def test_the_table_of_the_cut_is_the_cut(run):
    trainer, folder = run
    header, _, *rows = lines_of(section((folder / "README.md").read_text(), "How it was cut"))
    assert [row[:2] for row in rows] == [["0", "0-0"], ["1", "1-1"], ["2", "2-3"]]
    cut = trainer.assembly
    told = [sizes(cut.parameters, cut.heads, block) for block in range(3)]
    assert [int(row[2].replace(",", "")) for row in rows] == [size for size, _ in told]
    assert [row[3] for row in rows] == [f"{head:,}" for _, head in told[:2]] + [""]
    assert [row[5] for row in rows] == [taught_by(cut.cut, cut.config, cut.heads, block) for block in range(3)]
    assert {row[6] for row in rows} == {"cpu"}


def test_rates_are_told_where_blocks_learned_at_several(tmp_path):
    assert "learning rate" not in section(render(FACTS, tmp_path), "How it was cut")
    lower, last = FACTS.blocks
    several = replace(FACTS, blocks=(replace(lower, rate=0.3), replace(last, rate=1.0)))
    text = section(render(several, tmp_path), "How it was cut")
    header, _, *rows = lines_of(text)
    assert [row[-1] for row in (header, *rows)] == ["learning rate", "30%", "100%"]
    assert "The learning rate of a block's weights is a share of the run's" in text
    one = replace(FACTS, blocks=(replace(lower, rate=1.0), replace(last, rate=1.0)))
    assert "learning rate" not in section(render(one, tmp_path), "How it was cut")


def test_results_are_those_of_the_last_evaluation_with_every_head(run):
    trainer, folder = run
    text = section((folder / "README.md").read_text(), "Results")
    last = next(row for row in reversed(trainer.state.log_history) if "eval_loss" in row)
    header, _, *rows = lines_of(text)
    assert header[:3] == ["", "loss", "accuracy"]
    assert [row[0] for row in rows] == ["head of block 0", "head of block 1", "**this model** (block-local, 3 blocks)"]
    assert [row[2] for row in rows] == [
        f"{last[name]:.3f}" for name in ("eval_block_0_accuracy", "eval_block_1_accuracy", "eval_accuracy")
    ]
    assert NO_BASELINE in text
    assert "Evaluated on 8 examples." in text


def test_memory_and_time_are_those_of_the_history(run):
    trainer, folder = run
    _, _, row = lines_of(section((folder / "README.md").read_text(), "Memory and time"))
    peak = [row for row in trainer.history.rows if isinstance(row, Memory)][-1]
    assert row[:2] == ["0", "cpu"]
    assert row[2] in (f"{peak.peak_bytes / 2**20:.1f} MiB", f"{peak.peak_bytes / 2**30:.2f} GiB")
    assert row[4].endswith("(mean of 4)")


def test_only_arguments_that_are_not_the_default_are_told(run):
    rows = lines_of(section((run[1] / "README.md").read_text(), "Arguments that are not the default"))[2:]
    assert {row[0].strip("`"): row[1].strip("`") for row in rows} == {
        "num_blocks": "3",
        "head_layers": "0",
        "max_steps": "4",
        "learning_rate": "0.001",
        "per_device_train_batch_size": "4",
        "eval_strategy": "steps",
        "eval_steps": "2",
        "seed": "3",
        "use_cpu": "True",
    }


def test_default_arguments_are_none_to_tell_and_secrets_never_are(tmp_path):
    assert changed_arguments(TrainingArguments(str(tmp_path), use_cpu=True)) == {"use_cpu": True}
    told = TrainingArguments(
        str(tmp_path), use_cpu=True, hub_token="hf_secret", lr_scheduler_type="cosine", optim="sgd"
    )
    assert changed_arguments(told) == {"use_cpu": True, "lr_scheduler_type": "cosine", "optim": "sgd"}


def test_citations_are_those_of_the_losses_and_heads_used(tmp_path):
    trainer = trainer_in(tmp_path, config=BlockLocalConfig.from_preset("predsim", num_blocks=2, overlap=1))
    cited = "\n".join(trainer.model_card.facts().citations)
    for paper in ("1901.06656", "2305.14974", "2010.04116"):
        assert cited.count(paper) == 1
    assert "2101.10832" not in cited


@pytest.mark.parametrize("kind", [*LOSSES.values(), *FEEDBACK.values()])
def test_every_loss_and_every_feedback_network_names_its_paper(kind):
    assert re.search(r"\(\d{4}\), .+, arXiv \d{4}\.\d{5}$", kind.citation)


def test_a_single_block_is_called_backpropagation(tmp_path):
    trainer = trainer_in(tmp_path, config=BlockLocalConfig.from_preset("backprop"))
    trainer.train()
    trainer.save_model()
    text = (tmp_path / "README.md").read_text()
    assert "by ordinary backpropagation" in text
    assert "without a backward pass" not in text
    assert "## Citations" not in text
    assert not PLACEHOLDER.search(text)


@pytest.mark.parametrize(
    ("config", "claimed"),
    [
        ({"head_layers": 0}, True),
        ({"head_layers": 3}, False),
        ({"head_layers": 0, "overlap": 1}, False),
        ({"head_layers": 0, "polish": 0.5}, False),
    ],
)
def test_no_backward_pass_through_the_whole_network_is_claimed_only_where_there_was_none(config, claimed, tmp_path):
    trainer = trainer_in(tmp_path, config=BlockLocalConfig(num_blocks=2, boundaries=(1,), **config))
    trainer.train()
    text = render(trainer.model_card.facts(), tmp_path)
    assert ("without a backward pass through the whole network" in text) is claimed
    assert ("In 50.0% of the optimizer steps" in text) is ("polish" in config)


def test_what_only_heads_are_scored_by_has_a_column_too():
    metrics = {"eval_loss": 1.0, "eval_block_0_loss": 2.0, "eval_block_0_accuracy": 0.25}
    header, _, *rows = lines_of(section(render(replace(FACTS, result=RunResult("x", metrics)), "."), "Results"))
    assert header == ["", "loss", "accuracy"]
    assert [row[1:] for row in rows] == [["2.000", "0.250"], ["1.000", ""]]


def test_every_device_of_every_process_has_its_row():
    peaks = tuple(Memory(8, f"cuda:{index}", (index + 1) << 30, "allocated", index) for index in (0, 1))
    times = tuple(StepTime(8, 0.25 * (index + 1), 8, index, f"cuda:{index}") for index in (0, 1))
    told = section(render(replace(FACTS, peaks=peaks, times=times), "."), "Memory and time")
    assert lines_of(told)[2:] == [
        ["0", "cuda:0", "1.00 GiB", "allocated", "0.25 s (mean of 8)"],
        ["1", "cuda:1", "2.00 GiB", "allocated", "0.5 s (mean of 8)"],
    ]
    assert "Resident" not in told


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0.0123, "0.0123 s"), (99.96, "100 s"), (631.2, "631 s"), (3600, "1 h 0 min"), (9300, "2 h 35 min")],
)
def test_seconds_are_written_so_that_runs_can_be_compared(seconds, written):
    assert duration(seconds) == written


# ---- The baseline ----


def test_a_baseline_stands_beside_the_model_with_its_budget(tmp_path):
    plain = Trainer(
        BERT.build(),
        arguments(tmp_path / "plain", max_steps=4),
        train_dataset=examples(BERT),
        eval_dataset=examples(BERT)[:8],
        compute_metrics=accuracy,
    )
    plain.train()
    metrics = plain.evaluate()
    plain.save_state()
    trainer = trainer_in(tmp_path / "ours")
    trainer.add_callback(ModelCardCallback(trainer, baseline=tmp_path / "plain"))
    trainer.train()
    trainer.save_model()
    text = section((tmp_path / "ours" / "README.md").read_text(), "Results")
    last = lines_of(text)[-1]
    assert last[:3] == ["baseline: plain Trainer", f"{metrics['eval_loss']:.3f}", f"{metrics['eval_accuracy']:.3f}"]
    assert "The baseline had the same budget" in text
    assert NO_BASELINE not in text


def test_a_baseline_with_another_budget_is_said_to_have_one():
    other = RunResult("plain Trainer", METRICS, steps=16, epochs=4.0)
    text = render(replace(FACTS, baseline=other), ".")
    assert "did not have the same budget: 16 optimizer steps against 8, 4 epochs against 2." in text
    assert "is not recorded" in render(replace(FACTS, baseline=baseline_of(METRICS)), ".")


@pytest.mark.parametrize("kind", ["nowhere", "broken", "not evaluated", "no metrics"])
def test_a_baseline_that_is_none_is_refused(kind, tmp_path):
    source = tmp_path
    if kind == "broken":
        (tmp_path / "trainer_state.json").write_text("{")
    elif kind == "not evaluated":
        (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"loss": 1.0, "step": 1}]}))
    elif kind == "no metrics":
        source = {"accuracy": 0.5}
    with pytest.raises(CardError, match="^The baseline .*(is not the folder of a run|has no evaluation)"):
        baseline_of(source)
