"""The table of tasks in the README, from the YAML files in configs/train."""

from __future__ import annotations

from pathlib import Path

import yaml

from tasks import KITS, kit_of


def tasks_table(folder: Path) -> list[str]:
    """Return a line of Markdown for each configuration, in the order of the tasks.

    Args:
        folder: The folder with the YAML files.
    """
    runs = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.glob("*.yaml")}
    lines = [
        "| task | `configs/train/` | what a head of a block's own predicts | metric | model |",
        "|---|---|---|---|---|",
    ]
    for name in sorted(runs, key=lambda name: (list(KITS).index(_task(runs[name])), name)):
        run = runs[name]
        kit = kit_of(_task(run), run.get("options", {}))
        model = run["model"]
        shown = f"`{Path(model).name}`" if isinstance(model, str) else f"{model['model_type']}, random weights"
        lines.append(f"| {_task(run)} | `{name}` | {kit.predicts} | `{kit.metric}` | {shown} |")
    return lines


def _task(run: dict) -> str:
    return run.get("task", "text-classification")
