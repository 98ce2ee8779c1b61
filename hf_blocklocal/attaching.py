"""Put saved heads back on a plain model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from hf_blocklocal.anatomy.example import example_batch
from hf_blocklocal.assembling import assemble
from hf_blocklocal.assembly import Assembly
from hf_blocklocal.checkpoint import load_heads_, saved_boundaries
from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.hub import fetch


def load_heads(
    source: str | os.PathLike[str],
    model: nn.Module,
    inputs: Mapping[str, Any] | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Assembly:
    """Attach the heads that a model was trained with, to go on training or to see what each block predicts.

    Args:
        source: A folder that `save_model()` has written, or a repository on the Hub.
        model: The model, loaded from there or anywhere with `from_pretrained`.
        inputs: A small batch with labels, on the model's device; it tells what the model is to predict. For text,
            images and sounds and the usual tasks, one is made up.
        revision: Branch, tag or commit of the repository.
        token: A token that may read it; None takes that of `hf auth login` or HF_TOKEN.

    Returns:
        The model, cut as it was trained, with its heads.

    Raises:
        FetchError: If the source cannot be read.
        InputsNeededError: If no batch can be made up for this model.
        HeadsMismatchError: If the heads belong to another model, naming the first tensor that does not fit.
    """
    folder = fetch(source, revision=revision, token=token)
    config = BlockLocalConfig.from_pretrained(folder)
    if config.balance != "layers":
        # The balance depends on the traced batch; where the cut has been is known.
        config = replace(config, boundaries=saved_boundaries(folder), balance="layers")
    assembly = assemble(model, config, example_batch(model) if inputs is None else inputs)
    load_heads_(assembly.heads, folder, cut=assembly.cut)
    return assembly
