"""Feedback heads on disk, beside an ordinary transformers checkpoint that never mentions them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_blocklocal.config.block_local import CONFIG_NAME
from hf_blocklocal.cut.blocks import Cut
from hf_blocklocal.errors import HeadsMismatchError


HEADS_NAME = "block_local_heads.safetensors"
FILES = (CONFIG_NAME, HEADS_NAME)


def save_heads(save_directory: str | os.PathLike[str], *, heads: Mapping[str, Tensor], cut: Cut) -> None:
    """Write `block_local_heads.safetensors` into a folder.

    Args:
        save_directory: The folder of the checkpoint.
        heads: State dict of the heads; with a single block there are none, and the file says so.
        cut: Where the model was cut, kept in the file's metadata.
    """
    # One entry, because safetensors writes several in an order that differs from file to file.
    metadata = {"boundaries": json.dumps(cut.boundaries)}
    tensors = {name: tensor.detach().contiguous() for name, tensor in heads.items()}
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / HEADS_NAME, metadata=metadata)


def load_heads_(heads: nn.Module, save_directory: str | os.PathLike[str], *, cut: Cut) -> None:
    """Read heads from a folder into the given ones.

    Args:
        heads: Heads of the same shapes, changed in place.
        save_directory: Folder with a `block_local_heads.safetensors`.
        cut: How the model is cut now.

    Raises:
        HeadsMismatchError: If the file is missing, was made for another cut, or holds other tensors. The heads are
            left as they were.
    """
    path = Path(save_directory) / HEADS_NAME
    check_same_cut(save_directory, cut=cut)
    if path.is_file():
        tensors = load_file(path)
        _check_tensors(path, tensors, heads.state_dict())
        heads.load_state_dict(tensors)


def check_same_cut(save_directory: str | os.PathLike[str], *, cut: Cut) -> None:
    """Refuse heads of another cut, or none where there should be some.

    Args:
        save_directory: Folder with a `block_local_heads.safetensors`.
        cut: How the model is cut now.

    Raises:
        HeadsMismatchError: If the file is missing, or was made for another cut.
    """
    path = Path(save_directory) / HEADS_NAME
    if not path.is_file():
        if cut.num_blocks == 1:  # also the plain Trainer's checkpoints
            return
        raise HeadsMismatchError(
            f"{save_directory} holds no {HEADS_NAME}: it was not saved by block-local training. Start from its model "
            "weights instead of resuming, or choose another checkpoint."
        )
    saved = _boundaries(path)
    boundaries = list(cut.boundaries)
    if saved != boundaries:
        blocks = "an unknown number of" if saved is None else len(saved) + 1
        raise HeadsMismatchError(
            f"The heads in {path} belong to {blocks} blocks with boundaries {saved}, but this run has "
            f"{cut.num_blocks} blocks with boundaries {boundaries}. Use the "
            f"options of that run with boundaries={saved}, and neither num_blocks nor balance, or train on from the "
            "model weights alone."
        )


def saved_boundaries(save_directory: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """Return the first layer of every block but the first, for the heads in a folder; None if that is unknown."""
    path = Path(save_directory) / HEADS_NAME
    boundaries = _boundaries(path) if path.is_file() else None
    return None if boundaries is None else tuple(boundaries)


def _boundaries(path: Path) -> list[int] | None:
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("boundaries", "null"))


def _check_tensors(path: Path, saved: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in sorted(saved.keys() | expected.keys()):
        if name not in saved or name not in expected:
            where = "not in the file" if name not in saved else "not in these heads"
            raise HeadsMismatchError(
                f"The heads in {path} do not fit: {name} is {where}. They were made with another feedback, loss or "
                "task; use the block_local_config.json saved beside them."
            )
        if saved[name].shape != expected[name].shape:
            raise HeadsMismatchError(
                f"The heads in {path} do not fit: {name} has shape {tuple(saved[name].shape)} in the file and "
                f"{tuple(expected[name].shape)} here. They were made for another model, or with another latent_dim."
            )
