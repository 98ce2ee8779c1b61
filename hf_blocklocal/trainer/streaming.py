"""Let transformers save a model whose tensors are elsewhere, while one of them at a time comes here.

It is given a state dict without values, from which it makes out names, shards and index as ever. Where it would write
a file at once, that is done tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, modeling_utils

from hf_blocklocal.parallel.tensor_file import write_tensors
from hf_blocklocal.parallel.wire import TensorForm


class ConvertedError(Exception):
    """The model's format on disk is made by computing with its tensors, so they have to be there."""


def can_be_streamed(model: nn.Module) -> bool:
    """Tell whether a model is saved such that its tensors need not be there all at once."""
    return (
        isinstance(model, PreTrainedModel)
        and not getattr(model, "_hf_peft_config_loaded", False)
        and not hasattr(model, "hf_device_map")  # tensors without values are looked for where it says
        and hasattr(modeling_utils, "safe_save_file")
    )


@contextmanager
def saved_one_by_one(forms: Mapping[str, TensorForm], fetch: Callable[[str], Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield a state dict without values for `save_pretrained`, which asks for these as it writes inside the `with`.

    Args:
        forms: What the tensors of the model are like, by name.
        fetch: Returns one of them by name, on the CPU.

    Raises:
        ConvertedError: If a file is to hold what is none of those tensors. It has not been begun then.
    """
    placeholders = {name: form.empty(torch.device("meta")) for name, form in forms.items()}
    names = {id(tensor): name for name, tensor in placeholders.items()}
    own = modeling_utils.safe_save_file

    def write(tensors: Mapping[str, Tensor], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        if not all(id(tensor) in names for tensor in tensors.values()):
            raise ConvertedError
        here = {name: names[id(tensor)] for name, tensor in tensors.items()}
        write_tensors(
            Path(filename),
            {name: forms[source] for name, source in here.items()},
            lambda name: fetch(here[name]),
            metadata,
        )

    modeling_utils.safe_save_file = write
    try:
        yield dict(placeholders)
    finally:
        modeling_utils.safe_save_file = own
