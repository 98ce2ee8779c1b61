"""One run of `train.py`: what its YAML file says, and what it came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """What a YAML file of `configs/train` says; its comments say what each key means."""

    model: str | dict[str, Any]
    dataset: str
    task: str = "text-classification"
    options: dict[str, Any] = field(default_factory=dict)
    subset: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    train_split: str = "train"
    test_split: str = "test"
    max_length: int = 128
    train_samples: int | None = None
    test_samples: int | None = None
    baseline: bool = False
    diagnostics: int | None = None
    card: dict[str, Any] = field(default_factory=dict)
    threshold: float = 0.9
    examples: list[Any] = field(default_factory=list)
    block_local: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """The file that says what to train, and the command that has named it."""

    config: str
    command: str


@dataclass(frozen=True)
class Outcome:
    """What one training run came to, and what came of each size of its model."""

    name: str
    metrics: dict[str, float]
    seconds: float
    peak_bytes: int
    unpushed: str | None = None
    sizes: list[dict[str, Any]] = field(default_factory=list)
    metric: str = "accuracy"


def read_run(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read a YAML file and `key=value` or `section.key=value` overrides.

    Raises:
        ValueError: If a key is unknown or missing.
    """
    import yaml

    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    for override in overrides:
        name, separator, text = override.partition("=")
        *sections, key = name.split(".")
        if not separator or len(sections) > 1:
            raise ValueError(f"{override!r} is no override. Write key=value or section.key=value.")
        holder = values.setdefault(sections[0], {}) if sections else values
        holder[key] = _value(yaml.safe_load(text))
    known = {f.name for f in fields(Run)}
    missing = {"model", "dataset"} - set(values)
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{path} has unknown keys {unknown}. Known are {sorted(known)}.")
    if missing:
        raise ValueError(f"{path} lacks {sorted(missing)}.")
    return Run(**values)


def _value(value: Any) -> Any:
    """Read `1e-4` as the number that YAML, which asks for `1.0e-4`, does not see in it."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
