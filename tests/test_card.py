"""A model card says what its run says, and nothing else; what somebody else has written stays."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from test_parity import arguments, examples
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer
from hf_blocklocal.callbacks import HistoryCallback, ModelCardCallback
from hf_blocklocal.callbacks.model_card import changed_arguments
from hf_blocklocal.card import (
    BEGIN,
    END,
    FIELDS,
    TEMPLATE,
    BaseModel,
    CardFacts,
    Data,
    RunResult,
    base_model_of,
    baseline_of,
    data_of,
    name_location,
    render,
    write_card,
)
from hf_blocklocal.card.tables import NO_BASELINE, duration
from hf_blocklocal.describing import sizes, taught_by
from hf_blocklocal.errors import CardError
from hf_blocklocal.feedback import FEEDBACK
from hf_blocklocal.history import BlockOfCut, Memory, StepTime
from hf_blocklocal.losses import LOSSES


# What drafts of cards are full of, and what unfilled fields would look like.
PLACEHOLDER = re.compile(
    r"(?i:more information needed|todo|tbd|lorem|path/to|xxx)|\{\{|\}\}|\bNone\b|\bnan\b|<[a-z_ ]+>"
)
BERT = SPECIMENS["bert"]
BLOCKS = (
    BlockOfCut(0, 1, 1200, 30, 0.004, "DirectFeedback, Contrast (gaussian)", "cpu"),
    BlockOfCut(2, 3, 1300, 0, None, "the model's own loss", "cpu"),
)
METRICS = {
    "eval_loss": 0.5,
    "eval_accuracy": 0.75,
    "eval_block_0_loss": 0.7,
    "eval_block_0_accuracy": 0.5,
    "eval_runtime": 3.0,
    "eval_samples_per_second": 10.0,
}
FACTS = CardFacts(
    name="small",
    location=".",
    architecture="BertForSequenceClassification",
    parameters=2500,
    blocks=BLOCKS,
    result=RunResult("block-local, 2 blocks", METRICS, evaluated_at=8, steps=8, epochs=2.0, seconds=4.0),
    auto_class="AutoModelForSequenceClassification",
    pipeline_tag="text-classification",
    has_processor=True,
    data=Data("reviews", eval_rows=48, eval_split="test"),
)


def metadata(path):
    return ModelCard.load(path).data.to_dict()


def section(text, title):
    """The text below a heading."""
    return re.search(rf"^#+ {title}\n(.*?)(?=^#+ |\Z)", text, flags=re.MULTILINE | re.DOTALL)[1].strip()


def lines_of(table):
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in table.splitlines()
        if line.startswith("|")
    ]


def accuracy(output):
    return {"accuracy": (output.predictions.argmax(-1) == output.label_ids.ravel()).mean()}


def trainer_in(folder, *, config=None, model=None, tokenizer=None, **settings):
    rows = examples(BERT)
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2} | settings
    return BlockLocalTrainer(
        BERT.build() if model is None else model,
        arguments(folder, **settings),
        train_dataset=rows,
        eval_dataset=rows[:8],
        processing_class=tokenizer,
        compute_metrics=accuracy,
        block_local=BlockLocalConfig(num_blocks=3, head_layers=0) if config is None else config,
    )


def tokenizer():
    words = {"[PAD]": 0, "[UNK]": 1, "learns": 2}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run that is finished and saved, and its trainer."""
    folder = tmp_path_factory.mktemp("tiny-reviews")
    trainer = trainer_in(folder, tokenizer=tokenizer())
    trainer.train()
    trainer.save_model()
    return trainer, folder


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


# ---- Where the model comes from ----


def test_licence_and_language_are_inherited_from_the_card_beside_the_base_model(tmp_path):
    base = tmp_path / "base"
    BERT.build().save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: de\n---\n# Base\n")
    trainer = trainer_in(tmp_path / "run", model=type(BERT.build()).from_pretrained(base))
    trainer.train()
    trainer.save_model()
    data, text = metadata(tmp_path / "run" / "README.md"), (tmp_path / "run" / "README.md").read_text()
    assert (data["license"], data["language"]) == ("mit", "de")
    assert "base_model" not in data
    assert "Licence: mit, inherited from the base model." in text
    assert str(tmp_path) not in text


def test_a_base_model_without_a_licence_leaves_the_field_out_and_says_so(tmp_path):
    facts = replace(FACTS, base_model=base_model_of("someone/some-model"))
    write_card(facts, tmp_path)
    data = metadata(tmp_path / "README.md")
    assert data["base_model"] == "someone/some-model"
    assert "license" not in data
    assert "Licence: unknown." in (tmp_path / "README.md").read_text()


def test_a_card_of_the_base_model_that_cannot_be_read_tells_nothing(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert base_model_of(str(tmp_path)) == BaseModel(None)
    assert base_model_of(str(tmp_path), "not an id at all / ?") == BaseModel("not an id at all / ?")
    assert base_model_of("") is None


def test_data_sets_tell_where_they_come_from():
    file = "hf://datasets/someone/reviews@0123abcd/data/train.parquet"
    info = SimpleNamespace(
        dataset_name="reviews", config_name="plain", license="cc-by-4.0", download_checksums={file: 1}
    )
    one = SimpleNamespace(info=info, split="test")
    assert data_of(one, one) == Data("reviews", "someone/reviews", "0123abcd", "plain", "cc-by-4.0", eval_split="test")
    local = SimpleNamespace(dataset_name="parquet", config_name="default", license="", download_checksums=None)
    assert data_of(SimpleNamespace(info=local), None) is None
    assert data_of([1, 2], None, stated=Data(name="numbers")) == Data("numbers", train_rows=2)


def test_metrics_are_in_the_metadata_where_task_and_data_set_have_a_name(tmp_path):
    write_card(FACTS, tmp_path)
    (entry,) = metadata(tmp_path / "README.md")["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "small"
    assert result["task"] == {"type": "text-classification"}
    assert result["dataset"] == {"name": "reviews", "type": "reviews", "split": "test"}
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [("loss", 0.5), ("accuracy", 0.75)]
    write_card(replace(FACTS, data=Data("My reviews, 2nd")), tmp_path / "named")
    (entry,) = metadata(tmp_path / "named" / "README.md")["model-index"]
    assert entry["results"][0]["dataset"] == {"name": "My reviews, 2nd", "type": "my-reviews-2nd"}
    nameless = replace(FACTS, data=Data(eval_rows=3))
    write_card(nameless, tmp_path / "nameless")
    assert "model-index" not in metadata(tmp_path / "nameless" / "README.md")


def test_a_number_that_is_none_stays_out_of_the_metadata(tmp_path):
    metrics = METRICS | {"eval_loss": float("nan")}
    write_card(replace(FACTS, result=RunResult("x", metrics)), tmp_path)
    (entry,) = metadata(tmp_path / "README.md")["model-index"]
    assert [metric["type"] for metric in entry["results"][0]["metrics"]] == ["accuracy"]


def test_figures_are_shown_where_they_exist(tmp_path):
    assert "## Curves" not in render(FACTS, tmp_path)
    (tmp_path / "plots").mkdir()
    for name in ("strange_one", "loss"):
        (tmp_path / "plots" / f"{name}.png").touch()
    shown = section(render(FACTS, tmp_path), "Curves")
    assert re.findall(r"!\[.+?\]\((.+?)\)", shown) == ["plots/loss.png", "plots/strange_one.png"]


@pytest.mark.parametrize("metrics", [{}, METRICS])
def test_every_combination_of_what_is_known_makes_a_card_without_placeholders(metrics):
    bare = CardFacts("m", ".", "X", 3, BLOCKS, RunResult("r", metrics))
    full = replace(
        FACTS,
        baseline=RunResult("plain Trainer", METRICS, steps=8, epochs=2.0, seconds=900.0, peak_bytes=1 << 31),
        times=(StepTime(8, 0.5, 8, 0, "cuda:0"),),
        peaks=(Memory(8, "cuda:0", 1 << 30, "allocated", 0),),
        steps_of_session=(4, 8),
        arguments={"learning_rate": 0.1, "lr_scheduler_kwargs": {"a": [1, 2]}},
        citations=(LOSSES["contrast"].citation,),
        config="a.yaml",
        command="python a.py",
        limits=("It is small.",),
        seed=0,
    )
    for facts in (bare, full):
        text = render(facts, ".")
        assert not PLACEHOLDER.search(text), PLACEHOLDER.search(text)
        assert "\n\n\n" not in text


# ---- Templates ----


def test_the_template_of_the_package_uses_every_field():
    assert set(re.findall(r"\{\{ (\w+) \}\}", TEMPLATE.read_text())) == set(FIELDS)


def test_a_template_with_an_unknown_field_is_refused_before_training(tmp_path):
    template = tmp_path / "card.md"
    template.write_text("# {{ name }}\n{{ accuracy_on_mars }}\n")
    trainer = trainer_in(tmp_path)
    with pytest.raises(CardError, match=r"unknown field 'accuracy_on_mars'. Known are \['arguments', .*'summary'\]"):
        ModelCardCallback(trainer, template=template)
    with pytest.raises(CardError, match="There is no template .*nowhere.md"):
        ModelCardCallback(trainer, template=tmp_path / "nowhere.md")


def test_a_template_of_ones_own_is_filled_and_empty_headings_go(tmp_path):
    template, code = tmp_path / "card.md", "## Code\n\n```\n# one\n# two\n```\n"
    template.write_text("# {{name}}\n\n## Data\n\n### Base\n\n{{ curves }}\n\n" + code + "\n## End\n")
    assert render(FACTS, tmp_path, template=template) == "# small\n\n" + code


def test_what_a_run_says_is_never_taken_for_a_field(tmp_path):
    text = render(replace(FACTS, limits=("It was made with {{ name }}.",)), tmp_path)
    assert "It was made with {{ name }}." in text


# ---- Cards that are there already ----


def test_a_hand_written_card_keeps_its_text_and_its_metadata(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: cc0-1.0\ntags:\n- mine\ncustom: 3\n---\n# My model\n\nMy words.\n")
    write_card(FACTS, tmp_path)
    data, text = metadata(path), path.read_text()
    assert (data["license"], data["custom"]) == ("cc0-1.0", 3)
    assert data["tags"] == ["mine", "block-local", "hf_blocklocal"]
    assert text.index("My words.") < text.index(BEGIN) < text.index("## How it was cut") < text.index(END)


def test_an_updated_card_changes_between_its_markers_alone(tmp_path):
    path = write_card(FACTS, tmp_path)
    head, _, rest = path.read_text().partition(BEGIN)
    path.write_text(f"{head}Before.\n\n{BEGIN}{rest}\nAfter.\n".replace("tags:", "license: mit\ntags:"))
    write_card(replace(FACTS, name="other", result=RunResult("x", {"eval_accuracy": 0.9})), tmp_path)
    text, data = path.read_text(), metadata(path)
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.index("Before.") < text.index("# other") < text.index("After.")
    assert "# small" not in text
    assert data["license"] == "mit"
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.9
    before = path.read_text()
    write_card(replace(FACTS, name="other", result=RunResult("x", {"eval_accuracy": 0.9})), tmp_path)
    assert path.read_text() == before


def test_a_card_without_metadata_is_kept_too(tmp_path):
    (tmp_path / "README.md").write_text("Just words.\n")
    write_card(FACTS, tmp_path)
    assert metadata(tmp_path / "README.md")["library_name"] == "transformers"
    assert "Just words." in (tmp_path / "README.md").read_text()


def test_drafts_that_nobody_has_written_are_replaced(tmp_path):
    Trainer(BERT.build(), arguments(tmp_path), train_dataset=examples(BERT)).create_model_card()
    assert "More information needed" in (tmp_path / "README.md").read_text()
    write_card(FACTS, tmp_path)
    assert "ore information needed" not in (tmp_path / "README.md").read_text()


def test_adapters_are_said_to_be_adapters_and_their_base_is_no_folder_of_this_machine(tmp_path):
    base = tmp_path / "base"
    BERT.build().save_pretrained(base)
    model = type(BERT.build()).from_pretrained(base)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    trainer = trainer_in(tmp_path / "run", model=model)
    trainer.train()
    for _ in range(2):  # PEFT writes into the card before us, each time
        trainer.save_model()
    text, data = (tmp_path / "run" / "README.md").read_text(), metadata(tmp_path / "run" / "README.md")
    assert data["library_name"] == "peft"
    assert "Only adapters are saved: loading them needs PEFT and the base model." in text
    assert str(tmp_path) not in text
    assert not PLACEHOLDER.search(text)
    code, names = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1], {}
    exec(compile(code.replace('"."', repr(str(tmp_path / "run"))), "card", "exec"), names)
    trained = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    loaded = [weight for name, weight in names["model"].named_parameters() if "lora_B" in name]
    assert all(torch.equal(one, other) for one, other in zip(trained, loaded, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"---\nlicense: mit\n---\n{BEGIN}\nno end\n", "has the line .* but not"),
        ("---\nlicense: [\n---\nwords\n", "has metadata that the Hub would refuse"),
        ("---\n- a list\n---\nwords\n", "has metadata that the Hub would refuse"),
    ],
)
def test_a_card_that_cannot_be_updated_is_left_as_it_is(text, message, tmp_path):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(CardError, match=message):
        write_card(FACTS, tmp_path)
    assert (tmp_path / "README.md").read_text() == text


def test_the_quick_start_can_be_told_where_the_model_was_pushed(tmp_path):
    path = write_card(FACTS, tmp_path)
    assert name_location(tmp_path, "someone/small")
    assert 'name = "someone/small"\n' in path.read_text()
    assert not name_location(tmp_path, "someone/small")


# ---- When it is written ----


def test_only_a_finished_run_has_a_card(tmp_path):
    trainer = trainer_in(tmp_path, save_strategy="steps", save_steps=2)

    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.save_model()

    trainer.add_callback(Save())
    trainer.train()
    assert list(tmp_path.rglob("README.md")) == []
    trainer.save_model(tmp_path / "final")
    assert [path.parent.name for path in tmp_path.rglob("README.md")] == ["final"]


def test_the_weights_of_the_best_step_go_with_the_numbers_of_that_step(tmp_path):
    trainer = trainer_in(
        tmp_path, save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="accuracy"
    )
    scores = iter([0.9, 0.1])
    trainer.compute_metrics = lambda output: {"accuracy": next(scores)}
    trainer.train()
    result = trainer.model_card.facts().result
    assert (result.metrics["eval_accuracy"], result.evaluated_at, result.steps) == (0.9, 2, 4)
    assert "The numbers are those after step 2 of 4." in render(trainer.model_card.facts(), tmp_path)


def test_the_parents_arguments_are_heeded_and_figures_drawn(run):
    trainer, folder = run
    stated = {"model_name": "Named", "finetuned_from": "someone/base", "license": "mit", "language": "en"}
    stated |= {"dataset": "Reviews", "dataset_tags": "someone/reviews", "dataset_args": "plain"}
    trainer.create_model_card(tags="mine", tasks="text-classification", **stated)
    data = metadata(folder / "README.md")
    assert (data["base_model"], data["license"], data["language"]) == ("someone/base", "mit", "en")
    assert data["datasets"] == ["someone/reviews"]
    assert data["tags"] == ["block-local", "hf_blocklocal", "mine"]
    assert data["model-index"][0]["results"][0]["dataset"]["config"] == "plain"
    text = (folder / "README.md").read_text()
    assert "# Named" in text
    shown = re.findall(r"\]\((plots/.+?)\)", text)
    assert {"plots/cut.png", "plots/loss.png", "plots/accuracy_by_depth.png", "plots/memory.png"} <= set(shown)
    assert all((folder / name).is_file() for name in shown)
    with pytest.raises(CardError, match=r"tasks=\['a', 'b'\] names 2"):
        trainer.create_model_card(tasks=["a", "b"])


def test_without_its_callback_the_card_is_the_parents(tmp_path):
    trainer = trainer_in(tmp_path)
    trainer.remove_callback(ModelCardCallback)
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "README.md").exists()
    trainer.create_model_card()
    assert "generated automatically" in (tmp_path / "README.md").read_text()


def test_another_card_or_history_takes_the_place_of_the_first_even_after_training(tmp_path):
    trainer = trainer_in(tmp_path)
    trainer.train()
    rows = list(trainer.history.rows)
    card, history = ModelCardCallback(trainer, limits=["It is small."]), HistoryCallback(trainer)
    trainer.add_callback(card)
    trainer.add_callback(history)
    seen = trainer.callback_handler.callbacks
    assert [one for one in seen if isinstance(one, ModelCardCallback | HistoryCallback)] == [card, history]
    assert trainer.model_card is card
    assert history.rows == rows
    trainer.save_model()
    assert "- It is small." in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", ["gpt2", "t5", "vit", "whisper", "bert_mlm", "bert_tokens"])
def test_the_class_that_loads_a_model_is_named_for_every_task(name, tmp_path):
    specimen = SPECIMENS[name]
    trainer = BlockLocalTrainer(
        specimen.build(),
        arguments(tmp_path, max_steps=1),
        train_dataset=examples(specimen),
        block_local=BlockLocalConfig(num_blocks=2, head_layers=0, negatives=16),
    )
    trainer.train()
    trainer.save_model()
    code = re.search(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), flags=re.DOTALL)[1]
    names = {}
    exec(compile(code.replace('"."', repr(str(tmp_path))), "card", "exec"), names)
    assert type(names["model"]) is type(trainer.model)


def test_the_template_is_shipped_with_the_package():
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '"templates/*.md"' in pyproject
