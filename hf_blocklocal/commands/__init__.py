"""What is done from a shell: `hf-blocklocal plan`, `plot` and `push`. Each imports what it needs when it is run."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence


COMMANDS = {
    "plan": "which device gets which layers of a model, before anything is loaded",
    "plot": "draw a run from its history.jsonl",
    "push": "push the folder of a run to the Hub",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first word names, with the words after it."""
    parser = argparse.ArgumentParser(
        "hf-blocklocal",
        description="Plan, draw and share block-local runs.",
        epilog="\n".join(f"{name:6}{text}" for name, text in COMMANDS.items())
        + "\n\nhf-blocklocal COMMAND --help says what each takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the command takes")
    options = parser.parse_args(argv)
    importlib.import_module(f"{__name__}.{options.command}").main(options.arguments)
