"""A model card tells where model and data come from, as far as that is known."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from carding import (
    BERT,
    BLOCKS,
    FACTS,
    METRICS,
    PLACEHOLDER,
    metadata,
    section,
    trainer_in,
)

from hf_blocklocal.card import (
    BaseModel,
    CardFacts,
    Data,
    RunResult,
    base_model_of,
    data_of,
    render,
    write_card,
)
from hf_blocklocal.losses import LOSSES
from hf_blocklocal.records.history import Memory, StepTime


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
