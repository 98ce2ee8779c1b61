"""A file that is written tensor by tensor holds what `torch.save` would have put there at once."""

from __future__ import annotations

import zipfile

import torch
from fetching import Fetch

from hf_blocklocal.parallel.pickled_file import placeholders_for, write_pickled
from hf_blocklocal.parallel.wire import TensorForm


TENSORS = {
    "a/step": torch.tensor(3.0),
    "a/exp_avg": torch.randn(300, 40, generator=torch.Generator().manual_seed(0)),
    "b/step": torch.tensor(4.0),
    "b/exp_avg": torch.arange(5, dtype=torch.bfloat16),
    "b/codes": torch.arange(7, dtype=torch.uint8),
    "b/none": torch.empty(0, 2),
}


def state(tensors):
    return {
        "state": {
            0: {"step": tensors["a/step"], "exp_avg": tensors["a/exp_avg"]},
            1: {key: tensors[f"b/{key}"] for key in ("step", "exp_avg", "codes", "none")} | {"rank": 4},
        },
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1]}],
    }


def test_a_file_written_tensor_by_tensor_is_loaded_as_one_of_torch_save(tmp_path):
    fetch = Fetch(TENSORS)
    placeholders = placeholders_for({name: TensorForm.of(tensor) for name, tensor in TENSORS.items()})
    path = tmp_path / "optimizer.pt"
    write_pickled(path, state(placeholders), placeholders, fetch)
    assert fetch.most == 1
    assert zipfile.ZipFile(path).testzip() is None
    expected, loaded = state(TENSORS), torch.load(path)
    assert loaded["param_groups"] == expected["param_groups"]
    for index, kept in expected["state"].items():
        assert loaded["state"][index].keys() == kept.keys()
        for key, value in kept.items():
            found = loaded["state"][index][key]
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value
            assert type(found) is type(value)


def test_checksums_are_those_of_the_content(tmp_path):
    path = tmp_path / "optimizer.pt"
    placeholders = placeholders_for({name: TensorForm.of(tensor) for name, tensor in TENSORS.items()})
    write_pickled(path, state(placeholders), placeholders, TENSORS.get)
    content = bytearray(path.read_bytes())
    place = content.index(TENSORS["a/exp_avg"].numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert zipfile.ZipFile(path).testzip() is not None
