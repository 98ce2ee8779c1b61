"""A model card is written when there is something to say; what somebody else has written stays."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from carding import (
    BERT,
    FACTS,
    PLACEHOLDER,
    finished_run,
    metadata,
    trainer_in,
)
from peft import LoraConfig, get_peft_model
from test_parity import arguments, examples
from transformers import Trainer, TrainerCallback
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer
from hf_blocklocal.callbacks import HistoryCallback, ModelCardCallback
from hf_blocklocal.card import (
    BEGIN,
    END,
    FIELDS,
    TEMPLATE,
    RunResult,
    name_location,
    render,
    write_card,
)
from hf_blocklocal.errors import CardError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run that is finished and saved, and its trainer."""
    return finished_run(tmp_path_factory.mktemp("tiny-reviews"))


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


def test_a_run_whose_card_cannot_be_updated_saves_its_model_and_says_so(tmp_path, caplog):
    trainer = trainer_in(tmp_path)
    trainer.train()
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\nwords\n")
    trainer.save_model()
    assert "is saved without a card of this run" in caplog.text
    assert "has metadata that the Hub would refuse" in caplog.text
    assert (tmp_path / "model.safetensors").is_file()


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
