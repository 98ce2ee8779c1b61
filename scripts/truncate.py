"""Make smaller models of a run, one for each depth, and print what each of them costs and gets right.

python scripts/truncate.py runs/quickstart --output runs/quickstart/sizes
python scripts/truncate.py runs/quickstart --output runs/quickstart/sizes --steps 300 --samples 200

With early exits, for a range of thresholds, in the same table and figure:
python scripts/truncate.py runs/quickstart --output runs/quickstart/sizes --thresholds 0.5 0.7 0.9 0.95

Data and model are those of the run's result.json, or of a file of configs/train:
python scripts/truncate.py runs/mine --output runs/mine/sizes --config configs/train/quickstart.yaml

Task heads that no block has are fitted to training texts, everything below them standing still; the table says which.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes import Run, read_run


if TYPE_CHECKING:
    from torch.utils.data import DataLoader


def main(argv: Sequence[str] | None = None) -> None:
    """Truncate, measure, print the table, draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="folder of a run, with model and heads")
    parser.add_argument("--output", type=Path, required=True, help="folder for the smaller models, table and figure")
    parser.add_argument("--config", help="file of configs/train that says which data; default: that of the run")
    parser.add_argument("--steps", type=int, default=100, help="steps in which a task head is fitted")
    parser.add_argument("--samples", type=int, help="test texts to measure with; default: all")
    parser.add_argument("--thresholds", type=float, nargs="*", default=[], help="thresholds of early exits")
    options = parser.parse_args(argv)

    from hf_blocklocal.errors import BlockLocalError

    logging.getLogger("hf_blocklocal").setLevel(logging.INFO)
    try:
        rows = measured(options)
    except BlockLocalError as error:
        raise SystemExit(f"truncate.py: {error}") from None
    show(options, rows)


def measured(options: argparse.Namespace) -> dict[str, list[Any]]:
    """Return a row for each depth, and one for each threshold of early exits."""
    from hf_blocklocal import early_exit
    from hf_blocklocal.depth import Fit, measure_depths, open_trained, sweep

    opened = open_trained(options.run_dir)
    train, test = loaders(run_of(options), options.run_dir, options.samples)
    batches = list(test)
    rows = {"sizes": measure_depths(opened, batches, fit=Fit(train, options.steps), output=options.output)}
    if options.thresholds:
        exits = early_exit(opened.assembly, inputs=opened.inputs)
        rows["early exits"] = sweep(exits, batches, options.thresholds)
    return rows


def run_of(options: argparse.Namespace) -> Run:
    """Return what the run was made from."""
    if options.config is not None:
        return read_run(options.config)
    path = options.run_dir / "result.json"
    values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "run" not in values:
        raise SystemExit(f"truncate.py: {path} does not say which data the run had. Give --config configs/train/FILE.")
    return Run(**values["run"])


def loaders(run: Run, folder: Path, samples: int | None) -> tuple[DataLoader, DataLoader]:
    """Return batches of training texts, in an order drawn with the seed of the run, and of test texts."""
    import torch
    from tasks import kit_of
    from torch.utils.data import DataLoader

    prepared = kit_of(run.task, run.options).prepare(replace(run, model=str(folder)))
    collate, order = prepared.collator, torch.Generator().manual_seed(run.training.get("seed", 42))
    test = prepared.test
    test = test if samples is None else test.select(range(min(samples, len(test))))
    sizes = (run.training.get(f"per_device_{part}_batch_size", 8) for part in ("train", "eval"))
    train = DataLoader(prepared.train, next(sizes), shuffle=True, generator=order, collate_fn=collate)
    return train, DataLoader(test, next(sizes), collate_fn=collate)


def show(options: argparse.Namespace, rows: Mapping[str, Sequence[Any]]) -> None:
    """Print the table, write it as JSON and draw it."""
    from hf_blocklocal.depth import table
    from hf_blocklocal.plots.depths import draw_depths

    plain = {name: [row.to_dict() for row in group] for name, group in rows.items()}
    (options.output / "depths.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    words = {"title": "One model, several sizes", "whole": plain["sizes"][-1]["operations"]}
    everything = [*rows.get("early exits", ()), *rows["sizes"]]
    picture = draw_depths(plain, options.output / "depths.png", **words)
    print(f"{table(everything)}\n\nSaved in {options.output}; the figure is {picture}.")


if __name__ == "__main__":
    main()
