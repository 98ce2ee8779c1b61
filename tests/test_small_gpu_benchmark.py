"""The benchmark of a small GPU finds the largest batch that fits, to an eighth, and says where there is no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "benchmarks"))

import small_gpu  # noqa: E402


@pytest.mark.parametrize("fits", [0, 1, 3, 4, 7, 33, 100])
def test_the_largest_batch_is_found_to_an_eighth(fits, monkeypatch):
    tried = []

    def trial(size, batch, settings):
        tried.append(batch)
        return 0.5 if batch <= fits else None

    monkeypatch.setattr(small_gpu, "trial", trial)
    monkeypatch.setattr(small_gpu, "release", lambda: None)
    found = small_gpu.largest(small_gpu.SIZE, {})
    assert found["batch"] <= fits < found["batch"] + max(2, found["batch"] // 8 + 1)
    assert len(tried) == len(set(tried))
    rate = found["batch"] * small_gpu.SIZE.sequence / 0.5
    assert found["tokens_per_second"] == (rate if fits else None)


def test_lines_compare_with_backpropagation_where_that_fits_at_all():
    plain, other = ({"batch": batch, "tokens_per_second": 100.0 * batch} for batch in (4, 6))
    nothing = {"batch": 0, "tokens_per_second": None}
    assert small_gpu.compared(other, plain, 600.0) == ["1.50", "600", "1.50"]
    assert small_gpu.compared(other, nothing, 600.0) == ["-", "600", "-"]
    assert small_gpu.compared(nothing, plain, None) == ["-", "-", "-"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="measures the memory of a GPU, and there is none here"):
        small_gpu.main([])
