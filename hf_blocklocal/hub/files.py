"""What of a run's folder goes to the Hub: paths on disk by their paths in the repository. No network here."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from hf_blocklocal.borrowing.copies import COPIES_NAME
from hf_blocklocal.checkpoint import HEADS_NAME
from hf_blocklocal.config.block_local import CONFIG_NAME
from hf_blocklocal.errors import NotPushableError
from hf_blocklocal.optim.anchor import ANCHOR_NAME


# What a run that goes on needs, and a model that is shared does not.
_STATE = (ANCHOR_NAME, COPIES_NAME)
# Pickles can run code where they are loaded, and nothing that is shared needs one.
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_NOTES = (".md", ".png", ".jsonl")
# Folders of a run that belong to the model: figures, and what tokenizers write. Others hold runs of their own.
_SUBFOLDERS = ("plots/*.png", "additional_chat_templates/*.jinja")
_ARGUMENTS_NAME = "training_args.bin"


def run_files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Return all that is shared of a run: model, tokenizer, config, heads, card, history, figures.

    Checkpoints, pickles, baselines and other subfolders stay at home, and so does what starts with `_` or `.`.

    Args:
        folder: Where `save_model()` has written.

    Raises:
        NotPushableError: If the folder does not hold a run, whole.
    """
    folder = Path(folder)
    _check_is_run(folder)
    return {file.relative_to(folder).as_posix(): file for file in _shared(folder)}


def notes(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Return what lies beside the model in a run's folder: card, history, figures."""
    folder = Path(folder)
    shared = (file for file in _shared(folder) if file.suffix in _NOTES)
    return {file.relative_to(folder).as_posix(): file for file in shared}


def checkpoint_files(folder: str | os.PathLike[str], place: str) -> dict[str, Path]:
    """Return a checkpoint with all that a run needs to go on from it.

    Args:
        folder: The checkpoint.
        place: Folder in the repository.
    """
    files = (file for file in sorted(Path(folder).rglob("*")) if file.is_file() and file.name != _ARGUMENTS_NAME)
    return {f"{place}/{file.relative_to(folder).as_posix()}": file for file in files}


def stage(files: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Put files aside, as links where the disk can, so that they are still there when a slow push comes to them.

    Args:
        files: Paths on disk by their paths in the repository.
        folder: An empty folder.

    Returns:
        The same with the paths inside the folder.
    """
    staged = {}
    for name, file in files.items():
        staged[name] = folder / name
        staged[name].parent.mkdir(parents=True, exist_ok=True)
        # Notes are written again in place, which a link would follow.
        if file.suffix in _NOTES or not _link(file, staged[name]):
            shutil.copyfile(file, staged[name])
    return staged


def _link(file: Path, link: Path) -> bool:
    try:
        os.link(file, link)
    except OSError:
        return False
    return True


def _shared(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.iterdir()):
        is_ours = not file.name.startswith(("_", ".")) and file.name not in _STATE and file.suffix not in _PICKLES
        if file.is_file() and is_ours:
            yield file
    for pattern in _SUBFOLDERS:
        yield from sorted(folder.glob(pattern))


def _check_is_run(folder: Path) -> None:
    missing = _what_lacks(folder)
    if missing is None:
        return
    text = f"{folder} is not the folder of a run: {missing}. Name one that BlockLocalTrainer.save_model() has written"
    checkpoints = [path for path in folder.glob("checkpoint-*") if _what_lacks(path) is None]
    if checkpoints:
        newest = max(checkpoints, key=lambda path: path.stat().st_mtime)
        text += f", for example its newest checkpoint, {newest}"
    raise NotPushableError(f"{text}. Nothing was sent.")


def _what_lacks(folder: Path) -> str | None:
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / CONFIG_NAME).is_file():
        return f"it holds no {CONFIG_NAME}"
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return "it holds no config.json of a model"
    weights = {file.name for file in folder.glob("*.safetensors")} - {HEADS_NAME, *_STATE}
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if shards - weights:
            return f"{index.name} names {min(shards - weights)}, which is not there"
    return None if weights else "it holds no weights in safetensors"
