"""The house keeps its shape: imports point one way, foreign libraries stay in their rooms, files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_blocklocal


PACKAGE = Path(__file__).parents[1] / "hf_blocklocal"
FLOORS = [
    ["errors"],
    ["combinations", "crossing", "fitting", "generation", "lending", "loans", "values"],
    [
        "anatomy",
        "anchor",
        "bessel",
        "compilation",
        "config",
        "data_parallel",
        "extras",
        "history",
        "groups",
        "memory",
        "metrics",
        "operations",
        "optim",
        "overlap",
        "partition",
        "provenance",
        "signals",
        "standin",
        "targets",
    ],
    [
        "bootstrap",
        "copies",
        "defaults",
        "lane",
        "tying",
        "families",
        "polish",
        "sampling",
        "scaler",
        "scaling",
        "spans",
        "updates",
    ],
    ["asking", "losses", "model_costs"],
    ["feedback", "placement"],
    ["blocks", "card", "meters", "plots", "probe", "randomness", "reading", "settings"],
    ["checkpoint", "depth_plots", "inlets", "trace", "watch"],
    ["chunked", "needs"],
    ["blueprint", "hub", "replay", "shortcut"],
    ["denoising"],
    ["step"],
    ["building", "costs", "describing", "evaluation"],
    ["balancing"],
    ["assembly", "planning"],
    ["portrait"],
    ["attaching", "callbacks", "depth", "parallel"],
    ["devices"],
    ["trainer"],
]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
ALLOWED = {
    "accelerate": {"compilation", "trainer"},
    "torch.distributed": {"data_parallel", "parallel"},
    "transformers": {"anatomy", "blueprint", "callbacks", "depth", "scaling", "settings", "trainer", "metrics"},
    "datasets": {"metrics"},
    "evaluate": {"metrics"},
    "peft": set(),
    "matplotlib": {"depth_plots", "plots"},
    "huggingface_hub": {"card", "hub"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_has_a_floor():
    assert {room_of(path) for path in FILES} - {"__init__"} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = room_of(path)
    if room == "__init__":
        return
    for name in imports_of(path):
        if name.startswith("hf_blocklocal."):
            other = name.split(".")[1]
            assert other == room or FLOOR[other] < FLOOR[room], f"{room} must not import {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_foreign_libraries_stay_in_their_rooms(path):
    for name in imports_of(path):
        for library, rooms in ALLOWED.items():
            if name == library or name.startswith(f"{library}."):
                assert room_of(path) in rooms, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_say_their_idea_and_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert text.count("\n") <= 350


def test_public_names_are_documented():
    assert set(hf_blocklocal.__all__) <= set(dir(hf_blocklocal))
    for name in hf_blocklocal.__all__:
        assert getattr(hf_blocklocal, name).__doc__, name


def test_checkers_of_types_read_the_same_names():
    named = {}
    for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("hf_blocklocal."):
            named |= {alias.name: node.module for alias in node.names}
    assert named == {name: f"hf_blocklocal.{room}" for name, room in hf_blocklocal._ROOM_OF.items()}
    assert named.keys() == set(hf_blocklocal.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'assembel'"):
        hf_blocklocal.assembel  # noqa: B018


@pytest.mark.parametrize("module", ["hf_blocklocal", "hf_blocklocal.plots", "hf_blocklocal.depth_plots"])
def test_what_needs_no_model_does_not_wait_for_torch(module):
    code = f"import sys, {module}; sys.exit({{'torch', 'transformers', 'matplotlib'}} & sys.modules.keys() or 0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
