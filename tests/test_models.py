"""Every architecture of the menagerie passes every check, or is refused with the reason that the README gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from examining import ARCHITECTURES, IDLE, admit, comes_back, difference, leaks, refusal, untouched_by_a_step
from test_configs import script

from hf_blocklocal import BlockLocalConfig


IN_TWO = BlockLocalConfig(num_blocks=2)
RESULTS = Path(__file__).parents[1] / "scripts" / "benchmarks" / "results" / "supported_models.json"
WRITTEN = {row["name"]: row for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]}
SUPPORTED = [name for name, row in WRITTEN.items() if row["reason"] is None]
REFUSED = [name for name, row in WRITTEN.items() if row["reason"] is not None]


@pytest.fixture(scope="module", params=SUPPORTED)
def patient(request):
    return admit(ARCHITECTURES[request.param], IN_TWO)


def test_no_block_teaches_a_layer_of_another(patient):
    assert leaks(patient) == set()


def test_the_cut_leaves_logits_and_loss_as_they_were(patient, request):
    written = WRITTEN[request.node.callspec.params["patient"]]
    assert difference(patient) <= (0 if written["exact"] else 1e-5)


def test_one_step_trains_every_layer_that_the_task_uses(patient, request):
    assert untouched_by_a_step(patient) == IDLE.get(request.node.callspec.params["patient"], set())


def test_plain_transformers_loads_what_it_saves(patient):
    assert comes_back(patient)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_refused_with_the_reason(name):
    assert refusal(ARCHITECTURES[name], IN_TWO) == WRITTEN[name]["reason"]


def test_at_least_sixty_architectures_are_examined_and_none_is_left_out():
    assert WRITTEN.keys() == ARCHITECTURES.keys()
    assert len({row["class"] for row in WRITTEN.values()}) == len(WRITTEN)
    assert len(SUPPORTED) >= 60


def test_the_script_writes_what_the_checks_say(tmp_path, capsys):
    examined = script("supported_models")
    examined.main(["gpt2", "albert", "--output", str(tmp_path / "some.json")])
    rows = json.loads((tmp_path / "some.json").read_text(encoding="utf-8"))["rows"]
    assert rows == [WRITTEN["gpt2"], WRITTEN["albert"]]
    assert "1 supported, 1 refused" in capsys.readouterr().out
