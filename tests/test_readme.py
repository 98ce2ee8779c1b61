"""README and docs are true: code runs, commands exist, links lead somewhere, tables are what the results say."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file
from test_configs import script
from test_quickstart import call


sys.path.insert(0, str(Path(__file__).parent / "hub"))

from loopback_hub import LoopbackHub
from sharing import talk_to


ROOT = Path(__file__).parents[1]
# In the order of reading: the examples of a page go on from those before.
NAMES = ["README.md", *(f"docs/{name}.md" for name in ("diagnostics", "truncation", "hub", "peft_and_trl"))]
NAMES += [f"docs/{name}.md" for name in ("glossary", "gpu", "learning", "scaling", "teaching")]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
README = "\n".join(PAGES.values())


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_every_page_is_read():
    assert {name for name in NAMES if name != "README.md"} == {f"docs/{path.name}" for path in ROOT.glob("docs/*")}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Run all Python blocks in order, in one namespace, as a reader would who is logged in to a Hub.

    Returns:
        What each has printed, the history of the first training, and the folder it all happened in.
    """
    folder = tmp_path_factory.mktemp("readme")
    call("prepare_quickstart.py", "--output-dir", ".", folder=folder)
    namespace, printed, history, before = {}, [], [], Path.cwd()
    os.chdir(folder)
    try:
        with pytest.MonkeyPatch.context() as monkeypatch, LoopbackHub() as hub:
            talk_to(monkeypatch, hub.url, folder / "cache", token="hf_user")
            for code in blocks("python"):
                output = io.StringIO()
                with contextlib.redirect_stdout(output):
                    exec(compile(code, "README.md", "exec"), namespace)
                printed.append(output.getvalue())
                history = history or namespace["trainer"].state.log_history
    finally:
        os.chdir(before)
    return printed, history, folder


def test_every_python_block_runs(ran):
    assert len(ran[0]) == len(blocks("python")) == 14


def test_a_polish_with_adapters_ends_in_an_ordinary_checkpoint_with_other_weights(ran):
    first, polished = (
        load_file(ran[2] / "runs" / name / "final" / "model.safetensors") for name in ("first", "polish")
    )
    assert first.keys() == polished.keys()
    moved = {key for key in first if not torch.equal(first[key], polished[key])}
    attention = {
        f"bert.encoder.layer.{n}.attention.self.{kind}.weight" for n in range(6) for kind in ("query", "value")
    }
    assert moved == attention | {"classifier.weight", "classifier.bias"}


def test_the_printed_losses_are_those_of_the_run(ran):
    logged = next(row for row in ran[1] if "loss" in row)
    comment = next(line for line in README.splitlines() if line.startswith("# {'loss'"))
    stated = dict(re.findall(r"'([\w/]+)': '([\d.]+)'", comment))
    assert stated.keys() == {"loss", "block_0/loss", "block_1/loss", "block_2/loss"}
    for key, value in stated.items():
        # The texts are those of the running Python, so other versions differ a little.
        assert logged[key] == pytest.approx(float(value), abs=0.02 if sys.version_info[:2] == (3, 11) else 0.3)


def test_the_printed_cut_is_that_of_the_run(ran):
    stated = [line[2:] for line in README.splitlines() if re.match(r"# (block|\d)  +", line)]
    assert stated == [line.rstrip() for line in ran[0][1].splitlines()]


def test_the_scores_named_are_those_of_an_evaluation(ran):
    stated = next(line[2:] for line in README.splitlines() if line.startswith("# ['eval_block_0_loss'"))
    assert stated == ran[0][0].splitlines()[-1]


def test_the_figures_named_are_those_that_are_drawn(ran):
    stated = next(line[2:] for line in README.splitlines() if line.startswith("# ['loss.png'"))
    assert stated == next(text for text in ran[0] if "loss.png" in text).splitlines()[-1]


@pytest.mark.parametrize("command", [line for block in blocks("bash") for line in block.splitlines()])
def test_every_command_exists(command):
    tool, *words = command.split("#")[0].split()
    if tool == "accelerate":  # with a script of the reader's own
        known = launch_command_parser().parse_args([*words[1:-1], __file__])
        launched = known.num_processes or load_config_from_file(str(ROOT / known.config_file)).num_processes
        assert (words[0], launched) in [("launch", 4), ("launch", 8)]
        return
    assert tool == "make"
    subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, capture_output=True)


def test_every_file_named_exists():
    for name in re.findall(r"`((?:tests|scripts|configs|hf_blocklocal)/[\w/.]+)`", README):
        assert (ROOT / name).exists(), name


def anchors(text):
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [*NAMES, "configs/README.md", "model_cards/README.md"])
def test_every_link_leads_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    for link in links:
        place, _, anchor = link.partition("#")
        target = (ROOT / name).parent / place if place else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_tables_are_what_the_committed_results_say():
    readme = script("benchmarks/readme")
    sections = readme.sections()
    marked = re.findall(r"^<!-- (\w+) -->$", README, flags=re.MULTILINE)
    assert sorted(name for name in marked if name != "end") == sorted(sections)
    for name, text in sections.items():
        assert readme.between(readme.page_of(name).read_text(encoding="utf-8"), name) == text
