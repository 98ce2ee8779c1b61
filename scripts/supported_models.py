"""Find out which architectures can be trained block by block, by the checks that the tests run, and write it down.

Each is a tiny model with random weights, cut in two: the loss of a block reaches no other block, loss and logits stay
as they were, a step trains every layer, and plain transformers loads what is saved. What cannot be cut is listed with
the reason that a user would be told.

    OMP_NUM_THREADS=1 python scripts/supported_models.py                          # all, about a minute
    OMP_NUM_THREADS=1 python scripts/supported_models.py rwkv --output rwkv.json    # some

To put the list into README.md: python scripts/benchmarks/readme.py --write
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "benchmarks" / "results" / "supported_models.json"
# Attention may pick another kernel where a position bias no longer requires gradient.
CLOSE = 1e-5


def main(argv: Sequence[str] | None = None) -> None:
    """Examine architectures and write one row for each.

    Raises:
        RuntimeError: If one is neither supported nor refused.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="Architectures to examine. Default: all.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file.")
    options = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tests_importable():
        from examining import ARCHITECTURES

        rows = [examine(name, ARCHITECTURES[name]) for name in options.names or ARCHITECTURES]
    report = {
        "command": "python scripts/supported_models.py",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "rows": rows,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    refused = sum(row["reason"] is not None for row in rows)
    print(f"{len(rows) - refused} supported, {refused} refused. Written to {options.output}")


@contextmanager
def tests_importable() -> Any:
    """Let the models and the checks be imported from the tests' folder, for as long as they are used."""
    path, logger = str(ROOT / "tests"), logging.getLogger("hf_blocklocal")
    level = logger.level
    sys.path.insert(0, path)
    logger.setLevel(logging.ERROR)  # heads are heavy beside blocks this small
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.path.remove(path)


def examine(name: str, specimen: Any) -> dict[str, Any]:
    """Return the row of one architecture: its kind, its class, and why it is refused, or whether logits are exact."""
    import torch
    import transformers
    from examining import IDLE, admit, comes_back, difference, leaks, untouched_by_a_step

    from hf_blocklocal import BlockLocalConfig, BlockLocalError

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    config = specimen.build().config
    keeps_state = getattr(config, "use_cache", None) is False and getattr(type(config)(), "use_cache", False)
    row = {
        "name": name,
        "kind": kind(specimen, config),
        "class": type(specimen.build()).__name__,
        "needs": "use_cache=False" if keeps_state else None,
        "exact": None,
        "reason": None,
    }
    try:
        patient = admit(specimen, BlockLocalConfig(num_blocks=2))
    except BlockLocalError as error:
        return row | {"reason": str(error)}
    found, apart = leaks(patient), difference(patient)
    idle = untouched_by_a_step(patient) - IDLE.get(name, set())
    if found or apart > CLOSE or idle or not comes_back(patient):
        raise RuntimeError(f"{name} fails: reaches {found}, logits differ by {apart}, no step for {idle}.")
    return row | {"exact": apart == 0}


def kind(specimen: Any, config: Any) -> str:
    """Return the group in which an architecture is listed."""
    if specimen.task in ("image", "audio"):
        return {"image": "images", "audio": "audio"}[specimen.task]
    if config.is_encoder_decoder:
        return "encoder-decoders"
    return "decoders" if specimen.task == "vocabulary" else "encoders"


if __name__ == "__main__":
    main()
