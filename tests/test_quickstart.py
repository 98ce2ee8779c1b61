"""The quickstart in small: real model, real text, the scripts as a user runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_configs import script
from transformers import AutoModelForSequenceClassification

from hf_blocklocal import BlockLocalConfig


ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "train" / "quickstart.yaml"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    call("prepare_quickstart.py", "--output-dir", ".", folder=folder)
    return folder


def call(script, *arguments, folder):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def printed(prepared):
    """Run the quickstart on fewer texts; return what it prints."""
    small = ["train_samples=48", "test_samples=32", "training.num_train_epochs=1"]
    small += ["training.logging_steps=1", "diagnostics=2"]
    return call("train.py", str(CONFIG), *small, folder=prepared)


def peaks(printed):
    """The peak activations of the blocks and of plain backpropagation, in MiB."""
    ours, plain = (float(line.split()[-2]) for line in printed.splitlines() if line.endswith("MiB"))
    return ours, plain


def test_the_quickstart_prints_its_table_and_leaves_an_ordinary_checkpoint(prepared, printed):
    for line in ("head of block 0", "head of block 1", "block-local, 3 blocks", "plain Trainer", "MiB", "Saved in"):
        assert line in printed
    for line in ("1 of 3 blocks and 2 borrowed layers", "early exit at 0.3"):
        row = next(row for row in printed.splitlines() if row.strip().startswith(line))
        accuracy, milliseconds = map(float, row.removeprefix(f"  {line}").split())
        assert 0 <= accuracy <= 1
        assert milliseconds > 0
    folder = prepared / "runs" / "quickstart"
    named = printed.partition("Curves of every block, from history.jsonl:\n")[2].split()
    for name in ("cut", "loss", "accuracy", "accuracy_by_depth", "memory", "alignment", "probe", "drift"):
        assert f"runs/quickstart/plots/{name}.png" in named
    assert all((prepared / name).is_file() for name in named)
    assert call("plot.py", "runs/quickstart", folder=prepared).split() == named
    assert (folder / "block_local_heads.safetensors").is_file()
    card = (folder / "README.md").read_text()
    assert set(re.findall(r"\]\((plots/.+?)\)", card)) == {name.removeprefix("runs/quickstart/") for name in named}
    for words in ("baseline: plain Trainer", "had the same budget", "Licence: apache-2.0, inherited", "MiB"):
        assert words in card
    code = "import sys; sys.modules['hf_blocklocal'] = None\n"
    code += re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1] + "\nprint(model('Sort a list.')[0]['label'])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=True
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert result.stdout.splitlines()[-1] in model.config.label2id
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_every_size_of_a_run_becomes_a_model_that_needs_nothing_of_ours(prepared, printed):
    command = next(line for line in printed.splitlines() if line.startswith("Its first blocks")).split("truncate.py ")[
        1
    ]
    words = [*command.split(), "--samples", "8", "--steps", "2", "--thresholds", "0.2", "1.1"]
    table = call("truncate.py", *words, folder=prepared)
    for line in ("early exit at 1.1", "2 of 3 blocks, head fitted", "the whole model", "depths.png"):
        assert line in table
    folder = prepared / "runs" / "quickstart" / "sizes"
    assert (folder / "depths.png").is_file()
    code = (
        "import sys; sys.modules['hf_blocklocal'] = None\n"
        "from transformers import pipeline\n"
        "for name in ('1-blocks', '1-blocks-and-borrowed', '2-blocks'):\n"
        "    print(pipeline('text-classification', model=name)('Sort a list.')[0]['label'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=True
    )
    labels = AutoModelForSequenceClassification.from_pretrained(folder / "2-blocks").config.label2id
    assert len(result.stdout.split()) == 3
    assert set(result.stdout.split()) <= labels.keys()


def test_blocks_take_less_activation_memory_than_backpropagation(printed):
    ours, plain = peaks(printed)
    assert ours < 0.7 * plain  # the default keeps two borrowed layers beside a block of two, of six


def test_blocks_with_heads_of_their_own_take_half_of_it(prepared, environment, monkeypatch, capsys):
    monkeypatch.chdir(prepared)
    small = ["train_samples=16", "test_samples=8", "training.num_train_epochs=1", "training.output_dir=runs/own"]
    script("train").main([str(CONFIG), *small, "block_local.head_layers=0", "examples=[]"])
    ours, plain = peaks(capsys.readouterr().out)
    assert ours < 0.5 * plain


@pytest.mark.parametrize(
    ("size", "names"),
    [(1, ["GradientAlignmentCallback", "LinearProbeCallback", "DriftCallback"]), (2, ["DriftCallback"])],
)
def test_diagnostics_are_those_that_the_layout_can_show(size, names):
    class Looked:
        assembly = None
        block_local = BlockLocalConfig(num_blocks=2, block_parallel_size=size)
        train_dataset = eval_dataset = ()
        model, _parts = torch.nn.Linear(1, 1), {}  # noqa: RUF012

        def __init__(self):
            self.callbacks = []
            self.add_callback = self.callbacks.append

    trainer = Looked()
    script("train").add_diagnostics(trainer, every=3)
    assert [type(callback).__name__ for callback in trainer.callbacks] == names
