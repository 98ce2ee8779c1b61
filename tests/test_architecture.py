"""The house keeps its shape: imports point one way, foreign libraries stay in their rooms, files stay small."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_blocklocal


PACKAGE = Path(__file__).parents[1] / "hf_blocklocal"
FLOORS = [
    ["errors", "crossing", "fitting", "metrics", "randomness"],
    ["extras", "optim", "targets"],
    ["config", "losses", "records"],
    ["anatomy", "card", "plots"],
    ["cut"],
    ["borrowing", "checkpoint"],
    ["feedback", "hub"],
    ["teaching"],
    ["planning"],
    ["assembly"],
    ["assembling"],
    ["attaching", "callbacks", "depth", "parallel"],
    ["devices"],
    ["commands", "trainer"],
    ["__main__"],
]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
ALLOWED = {
    "accelerate": {"trainer"},
    "torch.distributed": {"optim.collectives", "optim.data_parallel", "parallel"},
    "transformers": {
        "anatomy.layers",
        "anatomy.modes",
        "callbacks",
        "commands.plan",
        "config.refusals",
        "depth",
        "metrics",
        "planning.blueprint",
        "teaching.loss_scale",
        "trainer",
    },
    "datasets": {"metrics"},
    "evaluate": {"metrics"},
    "peft": set(),
    "matplotlib": {"plots"},
    "huggingface_hub": {"card", "hub"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


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


def test_readme_shows_every_room():
    section = (PACKAGE.parent / "README.md").read_text(encoding="utf-8").split("## Read the code")[1].split("\n## ")[0]
    shown = set(re.findall(r"`(\w+)`", section.split("|---|---|")[1]))
    assert shown == {room_of(path) for path in FILES if path.name == "__init__.py"} - {"__init__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = room_of(path)
    if room == "__init__":
        return
    for name in imports_of(path):
        if name.startswith("hf_blocklocal."):
            other = name.split(".")[1]
            assert other == room or FLOOR[other] < FLOOR[room], f"{room} must not import {other}"


def test_no_files_import_each_other_in_a_circle():
    paths = {f"hf_blocklocal.{module_of(path)}": path for path in FILES if path != PACKAGE / "__init__.py"}
    above = {}
    for module, path in paths.items():
        named = paths.keys() & set(imports_of(path))
        # `from room import file` is an import of the file.
        above[module] = {name for name in named if not any(other.startswith(f"{name}.") for other in named)}
    while free := [module for module, below in above.items() if not below & above.keys()]:
        for module in free:
            del above[module]
    assert not above


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_foreign_libraries_stay_in_their_rooms(path):
    for name in imports_of(path):
        for library, places in ALLOWED.items():
            if name == library or name.startswith(f"{library}."):
                assert {room_of(path), module_of(path)} & places, f"{module_of(path)} imports {name}"


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
    assert named == {name: f"hf_blocklocal.{module}" for name, module in hf_blocklocal._MODULE_OF.items()}
    assert named.keys() == set(hf_blocklocal.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'assembel'"):
        hf_blocklocal.assembel  # noqa: B018


@pytest.mark.parametrize("module", ["hf_blocklocal", "hf_blocklocal.plots", "hf_blocklocal.plots.depths"])
def test_what_needs_no_model_does_not_wait_for_torch(module):
    code = f"import sys, {module}; sys.exit({{'torch', 'transformers', 'matplotlib'}} & sys.modules.keys() or 0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
