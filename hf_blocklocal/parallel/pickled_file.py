"""Write a file as `torch.save` does, one tensor at a time.

Such a file is a zip archive with a record for each tensor. It is written with gaps first, then filled, and then its
checksums are set right.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_blocklocal.parallel.wire import TensorForm


_CPU = torch.device("cpu")
# In an archive: sizes of what stands before a record and in the table of contents, aside from names, and where in it
# lengths of names and the checksum stand.
_LOCAL_SIZE, _LOCAL_LENGTHS, _LOCAL_CHECKSUM = 30, 26, 14
_ENTRY_SIZE, _ENTRY_LENGTHS, _ENTRY_CHECKSUM = 46, 28, 16
# What stands behind a record if the bit says so: four bytes, and then the checksum once more.
_DESCRIPTOR_BIT, _DESCRIPTOR_CHECKSUM = 8, 4


def placeholders_for(forms: Mapping[str, TensorForm]) -> dict[str, Tensor]:
    """Return tensors without content, for the value that `write_pickled` is given."""
    with FakeTensorMode():
        return {name: form.empty(_CPU) for name, form in forms.items()}


def write_pickled(path: Path, value: Any, placeholders: Mapping[str, Tensor], fetch: Callable[[str], Tensor]) -> None:
    """Write a value as `torch.save` does, with one of its tensors at a time in memory.

    Args:
        path: The file.
        value: Plain values and placeholders, each in one place, in nested dictionaries and lists.
        placeholders: Those placeholders by name.
        fetch: Returns the tensor of a name, on the CPU. Called once for each.
    """
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(value, path)
    names = {id(placeholder): name for name, placeholder in placeholders.items()}
    with path.open("r+b") as file:
        records = _records(file)
        # The library numbers tensors as it comes by them.
        for number, placeholder in enumerate(_tensors_in(value)):
            record = records[f"data/{number}"]
            assert record.size == placeholder.nbytes, "records are in the order of tensors"
            record.fill(file, fetch(names[id(placeholder)]))


@dataclass(frozen=True)
class _Record:
    """A record of an archive.

    Attributes:
        start: Where its content begins.
        size: Bytes of that.
        checksums: Where its checksum stands.
    """

    start: int
    size: int
    checksums: tuple[int, ...]

    def fill(self, file: BinaryIO, tensor: Tensor) -> None:
        """Put a tensor into it."""
        content = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        file.seek(self.start)
        file.write(content)
        checksum = zlib.crc32(content).to_bytes(4, "little")
        for place in self.checksums:
            file.seek(place)
            file.write(checksum)


def _records(file: BinaryIO) -> dict[str, _Record]:
    """Return the records of an archive by their names without its own."""
    with zipfile.ZipFile(file) as archive:
        entries, entry = archive.infolist(), archive.start_dir
    records = {}
    for info in entries:
        local = info.header_offset
        start = local + _LOCAL_SIZE + _sum_of_lengths(file, local + _LOCAL_LENGTHS, 2)
        told_behind = info.flag_bits & _DESCRIPTOR_BIT
        behind = start + info.file_size + _DESCRIPTOR_CHECKSUM if told_behind else local + _LOCAL_CHECKSUM
        records[info.filename.split("/", 1)[1]] = _Record(start, info.file_size, (behind, entry + _ENTRY_CHECKSUM))
        entry += _ENTRY_SIZE + _sum_of_lengths(file, entry + _ENTRY_LENGTHS, 3)
    return records


def _sum_of_lengths(file: BinaryIO, start: int, count: int) -> int:
    """Return the sum of lengths that stand in an archive one after the other, two bytes each."""
    file.seek(start)
    return sum(int.from_bytes(file.read(2), "little") for _ in range(count))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Return the tensors in a value, in its order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)
