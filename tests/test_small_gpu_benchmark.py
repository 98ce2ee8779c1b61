"""What is measured on a GPU alone: the search for the largest batch that fits, and the tables of what was found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "benchmarks"))

import block_parallel  # noqa: E402
import readme_gpu  # noqa: E402
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
    plain, other = ({"method": "K=4", "batch": batch, "tokens_per_second": 100.0 * batch} for batch in (4, 6))
    nothing = {"method": "K=4", "batch": 0, "tokens_per_second": None}
    assert small_gpu.cells(other, plain) == ["K=4", "6", "1.50", "600", "1.50"]
    assert small_gpu.cells(other, nothing) == ["K=4", "6", "", "600", ""]
    assert small_gpu.cells(nothing, plain) == ["K=4", "none", "", "", ""]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="measures the memory of a GPU, and there is none here"):
        small_gpu.main([])


def test_the_table_of_a_small_gpu_says_what_fits_and_how_fast():
    rows = [
        {"method": "backpropagation", "batch": 4, "tokens_per_second": 2000.0},
        {"method": "K=4", "batch": 6, "tokens_per_second": 1000.0},
        {"method": "too large", "batch": 0, "tokens_per_second": None},
    ]
    lines = readme_gpu.small_gpu({"size": vars(small_gpu.SIZE), "memory_gib": 16.0, "results": rows}, "here")
    assert lines[-3:] == [
        "| backpropagation | 4 | 1.00 | 2,000 | 1.00 |",
        "| K=4 | 6 | 1.50 | 1,000 | 0.50 |",
        "| too large | none |  |  |  |",
    ]
    assert "16 GiB of a GPU (here)." in lines


@pytest.mark.parametrize(("gpus", "shares", "backend"), [(1, False, "gloo"), (1, True, "nccl"), (2, False, "nccl")])
def test_the_table_of_parts_of_a_gpu_says_which_part_each_process_had(gpus, shares, backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", str(int(shares)))
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "50")
    ways = [block_parallel.BACKPROPAGATION, block_parallel.ONE, "block-local, 2 processes"]
    seconds = {way: 1.0 if block_parallel.WAYS[way].processes == 1 else 0.5 for way in ways}
    rounds = [
        {
            way: [{"wall": seconds[way], "processor": 1.0, "waited": 0.02}] * block_parallel.WAYS[way].processes
            for way in ways
        }
    ]
    report = {
        "size": vars(block_parallel.SIZES["cuda"]),
        "rounds": 1,
        "steps": 100,
        "results": [block_parallel.summary(way, rounds, block_parallel.SIZES["cuda"]) for way in ways],
    }
    lines = readme_gpu.parts_of_a_gpu(report | block_parallel.how_they_meet("cuda", 2), "here")
    assert any("each process with 50 % of a GPU," in line for line in lines)
    assert f"messages by {backend}" in lines
    assert lines[-1] == "| block-local, 2 processes | 64.0 | 2.00 | 2%, 2% |"
