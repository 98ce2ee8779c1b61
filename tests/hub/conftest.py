"""A loopback Hub that this process's own client talks to, and a run to share."""

from __future__ import annotations

import shutil

import pytest
from loopback_hub import LoopbackHub
from sharing import make, talk_to


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with LoopbackHub() as server:
        talk_to(monkeypatch, server.url, tmp_path / "cache")
        yield server
    assert server.mistakes == []


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run, saved with all that may lie in its folder. Nobody may change it."""
    folder = tmp_path_factory.mktemp("original") / "run"
    trainer = make(folder, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    (folder / "README.md").write_text("---\ntags: [block-local]\n---\nA card.\n", encoding="utf-8")
    (folder / "history.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    (folder / "plots").mkdir()
    (folder / "plots" / "loss.png").write_bytes(b"\x89PNG")
    (folder / "baseline").mkdir()
    (folder / "baseline" / "config.json").write_text("{}", encoding="utf-8")
    (folder / "_notes.txt").write_text("mine", encoding="utf-8")
    return folder


@pytest.fixture
def run(original, tmp_path):
    """The same run, free to be changed."""
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"
