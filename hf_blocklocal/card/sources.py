"""What can be known, without the network, about the base model, the data set and the baseline of a run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from hf_blocklocal.card.facts import BaseModel, Data, RunResult
from hf_blocklocal.errors import CardError, HistoryError
from hf_blocklocal.records.history import HISTORY_NAME, Logged, read_history


STATE_NAME = "trainer_state.json"
# What `datasets` calls a data set that was made of files or of memory, which is no name.
NO_NAMES = (
    "arrow",
    "audiofolder",
    "csv",
    "generator",
    "imagefolder",
    "json",
    "pandas",
    "parquet",
    "text",
    "webdataset",
)
_HUB_FILE = re.compile(r"hf://datasets/(?P<id>[^@]+)@(?P<revision>[0-9a-f]+)/")


def base_model_of(name_or_path: str | None, stated: str | None = None) -> BaseModel | None:
    """Say what a model was loaded from, and what the card says that lies there or in the cache of the Hub.

    Args:
        name_or_path: What `from_pretrained` was given; nothing for a model from scratch.
        stated: Its id on the Hub, if the user has said it.
    """
    if not name_or_path and not stated:
        return None
    is_folder = bool(name_or_path) and Path(name_or_path).is_dir()
    name = stated or (None if is_folder else name_or_path)
    card = _card_in(Path(name_or_path) / "README.md") if is_folder else None
    if card is None and name is not None:
        card = _card_in(_cached_card(name))
    if card is None:
        return BaseModel(name)
    return BaseModel(name, license=card.get("license"), language=card.get("language"))


def _cached_card(hub_id: str) -> Path | None:
    try:
        found = try_to_load_from_cache(hub_id, "README.md")
    except HFValidationError:  # what a user has stated is no id
        return None
    return Path(found) if isinstance(found, str) else None


def _card_in(path: Path | None) -> Mapping[str, Any] | None:
    """Return the metadata of a card; None if there is none that can be read, for it is somebody else's."""
    if path is None or not path.is_file():
        return None
    try:
        return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError):
        return None


def data_of(train: Any, evaluated: Any, *, stated: Data | None = None) -> Data | None:
    """Say what data sets tell about themselves, under what the user has stated.

    Args:
        train: The training set, of any kind; those of `datasets` know more than others.
        evaluated: The evaluation set, or several by name.
        stated: What the user has said, which counts more.
    """
    one = None if isinstance(evaluated, Mapping) else evaluated
    info = getattr(train, "info", None) or getattr(one, "info", None)
    files = " ".join(getattr(info, "download_checksums", None) or ())
    hub = _HUB_FILE.search(files)
    name = getattr(info, "dataset_name", None)
    config = getattr(info, "config_name", None)
    found = Data(
        name=None if name in NO_NAMES else name,
        hub_id=hub["id"] if hub else None,
        revision=hub["revision"] if hub else None,
        config=config if hub and config != "default" else None,
        license=getattr(info, "license", None) or None,
        train_rows=_length(train),
        eval_rows=_length(one),
        eval_split=str(one.split) if getattr(one, "split", None) else None,
    )
    values = {name: value for name, value in vars(stated or Data()).items() if value is not None}
    found = Data(**(vars(found) | values))
    return None if found == Data() else found


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def baseline_of(source: RunResult | Mapping[str, float] | str | os.PathLike[str]) -> RunResult:
    """Read what the baseline came to.

    Args:
        source: The folder of its run, which holds a `trainer_state.json` or a `history.jsonl`; or the metrics that
            its `evaluate()` returned; or both, and more, as a `RunResult`.

    Raises:
        CardError: If that is no run, or one without an evaluation.
    """
    if isinstance(source, RunResult):
        result = source
    elif isinstance(source, Mapping):
        result = RunResult("backpropagation", dict(source))
    else:
        result = _read_run(Path(source))
    if not result.of_model():
        raise CardError(
            f"The baseline {source!r} has no evaluation: nothing in it begins with 'eval_'. Evaluate it, as this run "
            "was."
        )
    return result


def _read_run(folder: Path) -> RunResult:
    state = folder / STATE_NAME
    try:
        if state.is_file():
            rows = json.loads(state.read_text(encoding="utf-8"))["log_history"]
        else:
            rows = [
                {"step": row.step, **row.values}
                for row in read_history(folder / HISTORY_NAME)
                if isinstance(row, Logged)
            ]
    except (json.JSONDecodeError, KeyError, TypeError, HistoryError) as error:
        raise CardError(
            f"The baseline {folder} is not the folder of a run: no {STATE_NAME} and no {HISTORY_NAME} in it can be "
            f"read ({error}). Call trainer.save_state() after train() and evaluate()."
        ) from error
    metrics, evaluated_at = last_evaluation(rows)
    return RunResult(
        "plain Trainer",
        metrics,
        evaluated_at=evaluated_at,
        steps=max((row.get("step", 0) for row in rows), default=None),
        epochs=max((row["epoch"] for row in rows if "epoch" in row), default=None),
        seconds=next((row["train_runtime"] for row in reversed(rows) if "train_runtime" in row), None),
    )


def last_evaluation(rows: list[dict[str, Any]], *, at: int | None = None) -> tuple[dict[str, float], int | None]:
    """Return the metrics of the last evaluation in a log history, all its data sets together, and its step.

    Args:
        rows: The log history.
        at: Take the last one at this step instead.
    """
    evaluations = [row for row in rows if any(name.startswith("eval_") for name in row)]
    step = at if at is not None else max((row.get("step", 0) for row in evaluations), default=None)
    metrics: dict[str, float] = {}
    for row in evaluations:
        if row.get("step", 0) == step:
            metrics |= {name: value for name, value in row.items() if name.startswith("eval_")}
    return metrics, step if metrics else None
