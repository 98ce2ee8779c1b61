"""A model whose tensors come one at a time is saved to the byte as one that is here."""

from __future__ import annotations

import pytest
import torch
from fetching import Fetch
from menagerie import MENAGERIE
from safetensors.torch import load_file, save_file
from zoo import SPECIMENS

from hf_blocklocal.parallel.tensor_file import write_tensors
from hf_blocklocal.parallel.wire import TensorForm
from hf_blocklocal.trainer.streaming import ConvertedError, can_be_streamed, saved_one_by_one


TENSORS = {
    "wide": torch.arange(6, dtype=torch.float32).view(2, 3),
    "turned": torch.arange(6, dtype=torch.float32).view(2, 3).T,
    "half": torch.ones(5, dtype=torch.bfloat16),
    "zählt": torch.tensor(7),
    "none": torch.empty(0, 4, dtype=torch.float64),
    "mask": torch.tensor([True, False, True]),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "two\nlines": torch.ones(2, dtype=torch.float16),
}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_written_tensor_by_tensor_is_that_of_the_library(tmp_path, metadata):
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "once", metadata)
    forms = {name: TensorForm.of(tensor) for name, tensor in TENSORS.items()}
    write_tensors(tmp_path / "slowly", forms, TENSORS.get, metadata)
    assert (tmp_path / "slowly").read_bytes() == (tmp_path / "once").read_bytes()
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_file(tmp_path / "slowly").items())


def streamed(model, folder, **options):
    """Save a model from copies of its tensors that are made when asked for; return how many were there at once."""
    state = model.state_dict()
    fetch = Fetch(state)
    with saved_one_by_one({name: TensorForm.of(tensor) for name, tensor in state.items()}, fetch) as placeholders:
        model.save_pretrained(folder, state_dict=placeholders, **options)
    return fetch.most


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama", "vit"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_a_model_is_saved_to_the_byte_and_one_tensor_at_a_time(name, options, borrow, tmp_path):
    model = borrow(name)
    assert can_be_streamed(model)
    model.save_pretrained(tmp_path / "once", **options)
    assert streamed(model, tmp_path / "slowly", **options) == 1
    files = {path.name for path in (tmp_path / "once").iterdir()}
    assert files == {path.name for path in (tmp_path / "slowly").iterdir()}
    assert any("of" in file for file in files) == ("max_shard_size" in options)
    for file in files:
        assert (tmp_path / "slowly" / file).read_bytes() == (tmp_path / "once" / file).read_bytes()


def test_a_format_that_computes_with_tensors_needs_them(tmp_path):
    model = MENAGERIE["qwen3_moe"].build()
    with pytest.raises(ConvertedError):
        streamed(model, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_saving_is_given_back_as_it_was(borrow, tmp_path):
    from transformers import modeling_utils

    own = modeling_utils.safe_save_file
    streamed(borrow("bert"), tmp_path)
    assert modeling_utils.safe_save_file is own
    assert not can_be_streamed(torch.nn.Linear(2, 2))
    assert SPECIMENS["bert"].build().state_dict().keys() <= load_file(tmp_path / "model.safetensors").keys()
