"""Write a safetensors file one tensor at a time, to the byte as the safetensors library writes it at once.

Such a file is the length of its header, the header as JSON, and the content of the tensors one after the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from hf_blocklocal.parallel.wire import TensorForm


_LENGTH_BYTES = 8


def write_tensors(
    path: Path,
    forms: Mapping[str, TensorForm],
    fetch: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors into a file, of which one at a time is in memory.

    Args:
        path: The file.
        forms: What each of them is like, by name.
        fetch: Returns one of them, on the CPU, by its name. Called once for each.
        metadata: What stands in the header beside them.
    """
    header, names = _header(forms, metadata)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(_LENGTH_BYTES, "little"))
        file.write(header)
        for name in names:
            file.write(memoryview(fetch(name).contiguous().reshape(-1).view(torch.uint8).numpy()))


def _header(forms: Mapping[str, TensorForm], metadata: Mapping[str, str] | None) -> tuple[bytes, list[str]]:
    """Return the header, and the names in the order of their content."""
    # The library decides on the order and on names of types; it is shown one number of each tensor.
    shown = save({name: form.of_one().empty(torch.device("cpu")) for name, form in forms.items()}, metadata)
    length = int.from_bytes(shown[:_LENGTH_BYTES], "little")
    entries: dict[str, Any] = json.loads(shown[_LENGTH_BYTES : _LENGTH_BYTES + length])
    names, end = [name for name in entries if name != "__metadata__"], 0
    names.sort(key=lambda name: entries[name]["data_offsets"])
    for name in names:
        start, end = end, end + math.prod(forms[name].shape) * forms[name].itemsize
        entries[name] |= {"shape": list(forms[name].shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text.ljust(-(-len(text) // _LENGTH_BYTES) * _LENGTH_BYTES), names
