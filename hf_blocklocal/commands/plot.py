"""Draw a run from its history.jsonl, one PNG each: losses, accuracies, the cut, memory, what the callbacks have seen.

hf-blocklocal plot runs/quickstart
hf-blocklocal plot runs/quickstart --output figures

To have more to draw than losses and accuracies, train with a look at every block each 10 steps:
python scripts/train.py configs/train/quickstart.yaml diagnostics=10
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, and print the names of the files."""
    parser = argparse.ArgumentParser(
        "hf-blocklocal plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run_dir",
        type=Path,
        help="output_dir of a run; without a history.jsonl its newest trainer_state.json is drawn",
    )
    parser.add_argument("--output", type=Path, help="folder for the PNGs (default: plots in the run's folder)")
    options = parser.parse_args(argv)

    from hf_blocklocal.errors import BlockLocalError
    from hf_blocklocal.plots import draw_run

    try:
        paths = draw_run(options.run_dir, options.output)
    except BlockLocalError as error:
        raise SystemExit(f"hf-blocklocal plot: {error}") from None
    print("\n".join(map(str, paths)))
