"""Open what block-local training has left: the model with its cut and its heads, from wherever they are."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from hf_blocklocal.anatomy.example import example_batch
from hf_blocklocal.anatomy.layers import is_encoder_decoder
from hf_blocklocal.anatomy.modes import evaluation_mode, outputs_not_recorded
from hf_blocklocal.assembling import assemble
from hf_blocklocal.assembly import Assembly
from hf_blocklocal.borrowing.shortcut import learns_past_layers
from hf_blocklocal.checkpoint import HEADS_NAME, load_heads_
from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.config.defaults import settled
from hf_blocklocal.errors import ConfigError, HeadsMismatchError, UnsupportedSettingError
from hf_blocklocal.targets.batch import Targets


Source = Assembly | PreTrainedModel | str | os.PathLike[str]
"""A folder saved by block-local training, a model in memory, or `trainer.assembly`."""


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A trained model that can be asked what each of its blocks predicts.

    Attributes:
        assembly: The model with its cut and its heads.
        inputs: A small batch with labels that it can run; None with a single block.
        folder: Where it was saved, if it comes from there.
        never_refreshed: Whether heads have trained copies of layers that were never brought in line with the model's.
    """

    assembly: Assembly
    inputs: Mapping[str, Any] | None
    folder: Path | None = None
    never_refreshed: bool = False

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self.assembly.module.model

    def warn_of_heads(self, what: str, blocks: Iterable[int]) -> None:
        """Say so if heads are asked for something that they have not learned: to do without layers above them.

        Args:
            what: What they are asked for.
            blocks: The blocks whose heads they are.
        """
        blocks = list(blocks)
        if self.never_refreshed and blocks:
            logger.warning(
                "%s use the layers of the model, and its heads have learned with copies of their own, which are gone "
                "(head_copies='trained' with head_refresh_steps=0): expect poor predictions. For models of several "
                "sizes, train with a head_refresh_steps above 0.",
                what,
            )
        past = [block for block in blocks if learns_past_layers(self.assembly.cut, block, self.assembly.config)]
        if past:
            logger.warning(
                "%s leave out layers with which the heads have learned (head_bypass='straight_through', block %s): "
                "expect poor predictions. For models of several sizes, train with head_bypass='skip'.",
                what,
                ", ".join(map(str, past)),
            )

    @torch.no_grad()
    def head_logits(self, block: int) -> Tensor:
        """Return what the head of a block predicts for the small batch, of the live layers, without dropout."""
        found: list[Tensor] = []
        targets = self.assembly.read_targets(self.inputs, whole_vocabulary=True)

        def leave(passed: int, hidden: Tensor, _router_logits: tuple[Tensor, ...]) -> None:
            if passed == block:
                found.append(logits_of_head(self.assembly, block, hidden, self.inputs, targets))

        with evaluation_mode(self.assembly.module), self.assembly.step.boundaries.attached(leave):
            self.model(**self.inputs)
        return found[0]


def logits_of_head(
    assembly: Assembly, block: int, hidden: Tensor, inputs: Mapping[str, Any], targets: Targets
) -> Tensor:
    """Return what the head of a block predicts, in the middle of the forward pass that has come to its end.

    Args:
        assembly: The model with its heads.
        block: The block.
        hidden: Its output.
        inputs: The inputs of the forward pass.
        targets: Which rows a head of its own is to read; over a vocabulary, with the whole of it as candidates.

    Returns:
        The logits of the shortened model, (B, C) or (B, S, C), from a head that borrows; else those of each target,
        (N, C).
    """
    head = assembly.heads[block]
    if not head.borrows:
        return head.logits(hidden, targets)
    with outputs_not_recorded():  # and of the live layers, also where training took copies
        return assembly.step.seen_by_head(block, hidden, inputs, None, shortened=True)


def open_trained(
    source: Source,
    *,
    config: BlockLocalConfig | None = None,
    heads: str | os.PathLike[str] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Opened:
    """Open a trained model.

    Args:
        source: A folder that a `BlockLocalTrainer` has saved; a model; or `trainer.assembly`, with its heads.
        config: How the model was cut and taught. A folder and an assembly know it.
        heads: Folder of the heads, for a model whose heads have parameters. A folder and an assembly have them.
        inputs: A small batch with labels; made up where the model's config tells what it takes.

    Raises:
        BlockLocalError: If something is missing or does not go together; the subclass and the text say how.
    """
    if isinstance(source, Assembly):
        if source.step.boundaries.station is not None:
            raise UnsupportedSettingError(
                "This process holds one block of the model, and all of them are needed. Save the model, and give the "
                "folder."
            )
        if source.step.devices:
            raise UnsupportedSettingError(
                "The blocks of this model lie on several devices, and so do the copies that its heads borrow. Save "
                "the model, and give the folder."
            )
        inputs = inputs or (example_batch(source.module.model) if source.last > 0 else None)
        return Opened(source, inputs, never_refreshed=_never_refreshes(source.config))
    folder = None
    if isinstance(source, str | os.PathLike):
        folder = heads = Path(source)
        config = BlockLocalConfig.from_pretrained(folder)
        source = load_model(folder)
    if not isinstance(source, PreTrainedModel):
        raise UnsupportedSettingError(
            f"A {type(source).__name__} is no transformers model. Give a model, a folder, or trainer.assembly; "
            "adapters are merged first: model.merge_and_unload()."
        )
    if config is None:
        raise ConfigError(
            f"How this {type(source).__name__} was cut is not known. Pass config=BlockLocalConfig(...), or give the "
            "folder that it was saved in, or trainer.assembly."
        )
    return _assembled(source, config, heads, inputs, folder)


def _assembled(
    model: PreTrainedModel,
    config: BlockLocalConfig,
    heads: str | os.PathLike[str] | None,
    inputs: Mapping[str, Any] | None,
    folder: Path | None,
) -> Opened:
    if config.blocks_apart:  # what is left open depends on it
        config = settled(config, single_stack=not is_encoder_decoder(model))
    never_refreshed = _never_refreshes(config)
    # Of copies and second runs nothing is left after training; heads borrow the layers that are saved.
    live = {"head_copies": "auto", "head_refresh_steps": None, "head_refresh_lag": None, "head_refresh_decay": None}
    config = replace(config, **live, denoising=0.0, block_parallel_size=1, placement="auto")
    boundaries = None if heads is None else saved_boundaries(heads)
    if boundaries is not None and len(boundaries) + 1 == config.num_blocks:
        config = replace(config, boundaries=boundaries, balance="layers")
    if config.num_blocks > 1 and inputs is None:
        inputs = example_batch(model)
    assembly = assemble(model, config, inputs or {})
    if heads is not None:
        load_heads_(assembly.heads, heads, cut=assembly.cut)
    elif any(True for _ in assembly.heads.parameters()):
        raise HeadsMismatchError(
            "The heads of these blocks have parameters of their own, and none were given. Pass heads=folder, or give "
            "the folder that model and heads were saved in, or trainer.assembly."
        )
    return Opened(assembly, inputs, folder, never_refreshed)


def _never_refreshes(config: BlockLocalConfig) -> bool:
    return config.head_copies == "trained" and config.head_refresh_steps == 0


def saved_boundaries(folder: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """Return where the heads in a folder say that the model was cut; None if they do not."""
    path = Path(folder) / HEADS_NAME
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        found = json.loads((file.metadata() or {}).get("boundaries", "null"))
    return None if found is None else tuple(found)


def load_model(folder: Path) -> nn.Module:
    """Load the model of a folder with the class that its config names.

    Raises:
        UnsupportedSettingError: If it names none that transformers has.
    """
    config = AutoConfig.from_pretrained(folder)
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise UnsupportedSettingError(
            f"{folder} is a model of class {names[0] if names else 'unknown'}, which transformers does not have. "
            "Load it yourself, and pass model, config and heads=folder."
        )
    return kind.from_pretrained(folder)
