"""`hf-blocklocal COMMAND` runs a command, and the scripts of a checkout are the same."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_blocklocal import commands


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as done:
        commands.main([name, "--help"])
    assert done.value.code == 0
    assert f"usage: hf-blocklocal {name} " in capsys.readouterr().out


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_the_script_of_that_name_is_the_command(name):
    words = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), "--help"]
    said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout
    assert said.startswith(f"usage: hf-blocklocal {name} ")


def test_without_a_command_all_are_named(capsys):
    for words in (["--help"], ["plam"]):
        with pytest.raises(SystemExit):
            commands.main(words)
        said = "".join(capsys.readouterr())
        assert all(name in said for name in commands.COMMANDS)


def test_the_command_that_is_installed_is_this_one():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert (
        pkgutil.resolve_name(re.search(r'^hf-blocklocal = "(.*)"$', project, flags=re.MULTILINE)[1]) is commands.main
    )


def test_a_command_that_needs_no_torch_does_not_wait_for_it():
    code = "import sys; from hf_blocklocal.commands import plan, plot, push; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
