"""The committed cards come from runs of the shipped configurations, and the Hub would take them."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from carding import PLACEHOLDER, lines_of, section
from huggingface_hub import ModelCard
from test_configs import TRAIN, script

from hf_blocklocal.card import BEGIN, END
from hf_blocklocal.records.history import HISTORY_NAME, CutRow, Evaluation, read_history


ROOT = Path(__file__).parents[1]
CARDS = {path.parent.name: path for path in sorted((ROOT / "model_cards").glob("*/README.md"))}
INDEX = (ROOT / "model_cards" / "README.md").read_text(encoding="utf-8")

over_cards = pytest.mark.parametrize("path", CARDS.values(), ids=CARDS)


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.stem)
def test_every_configuration_has_its_card(path):
    assert path.stem in CARDS
    assert f"[{path.stem}]({path.stem}/README.md)" in INDEX
    assert f"`configs/train/{path.name}`" in INDEX


def config_of(text):
    """Return the file that a card says its model was trained by."""
    return ROOT / re.search(r"Configuration: `(configs/train/.+?\.yaml)`\.", text)[1]


@over_cards
def test_a_card_has_valid_metadata_and_no_placeholder(path):
    text = path.read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert data.library_name == "transformers"
    assert {"block-local", "hf_blocklocal"} <= set(data.tags)
    run = script("train").read_run(config_of(text))
    assert data.base_model == run.card.get("base_model"), "a model with weights at random has none"
    assert data.pipeline_tag
    assert data.eval_results
    assert all(math.isfinite(result.metric_value) for result in data.eval_results)
    assert not PLACEHOLDER.search(text), PLACEHOLDER.search(text)
    assert text.count(BEGIN) == text.count(END) == 1


@over_cards
def test_a_card_names_its_configuration_and_its_command(path):
    text = path.read_text(encoding="utf-8")
    config = config_of(text).relative_to(ROOT)
    assert config_of(text).stem == path.parent.name
    assert f"Command: `python scripts/train.py {config}`." in text
    assert re.search(r"^- commit: `[0-9a-f]{40}`", text, flags=re.MULTILINE)
    run = script("train").read_run(ROOT / config)
    told = section(text, "Arguments that are not the default")
    assert f"| `num_blocks` | `{run.block_local['num_blocks']}` |" in told


@over_cards
def test_a_card_shows_the_numbers_and_the_figures_of_its_own_run(path):
    text, rows = path.read_text(encoding="utf-8"), read_history(path.parent / HISTORY_NAME)
    for name in re.findall(r"\]\((plots/.+?)\)", text):
        assert (path.parent / name).is_file()
    last = [row for row in rows if isinstance(row, Evaluation)][-1].values
    told = {line[0]: line for line in lines_of(section(text, "Results"))}
    (model,) = (line for name, line in told.items() if name.startswith("**this model**"))
    metrics = set(ModelCard(text).data.to_dict()["metrics"])
    assert "loss" in metrics
    for name in metrics:
        assert f"{last[f'eval_{name}']:.3f}" in model
    of_head = [f"{value:.3f}" for name, value in last.items() if name.startswith("eval_block_0_")]
    assert of_head
    assert set(of_head) <= set(told["head of block 0"]), "a number has no accuracy, all others have"
    (cut,) = (row for row in rows if isinstance(row, CutRow))
    assert [line[2] for line in lines_of(section(text, "How it was cut"))[2:]] == [
        f"{b.parameters:,}" for b in cut.blocks
    ]
    assert str(Path.home()) not in text
