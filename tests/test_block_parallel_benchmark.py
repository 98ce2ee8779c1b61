"""The throughput benchmark compares like with like: default heads with default heads, and all others with own ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hf_blocklocal import BlockLocalConfig


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "benchmarks"))

import block_parallel  # noqa: E402
import readme_scaling  # noqa: E402


ALONE = dict(zip(("ONE", "ONE_DEFAULT", "ONE_EVEN", "ONE_LENS"), (1.0, 1.5, 1.6, 1.1), strict=True))
SECONDS = {getattr(block_parallel, name): seconds for name, seconds in ALONE.items()} | {
    block_parallel.BACKPROPAGATION: 1.2
}


def report():
    """What a run would write in which one process takes so long, and more processes half of it."""
    rounds = []
    for _ in range(3):
        told = {}
        for name, way in block_parallel.WAYS.items():
            seconds = SECONDS.get(name, SECONDS[way.beside] / 2)
            told[name] = [{"wall": seconds, "processor": seconds, "waited": 0.0}] * way.processes
        rounds.append(told)
    results = [block_parallel.summary(way, rounds, block_parallel.SIZE) for way in block_parallel.WAYS]
    return {"size": vars(block_parallel.SIZE), "rounds": 3, "results": results}


def test_every_way_is_compared_with_the_same_work_in_one_process():
    ratios = {row["way"]: row[f"times {row['beside']}"]["wall"][0] for row in report()["results"]}
    assert ratios.pop(block_parallel.BACKPROPAGATION) == pytest.approx(1 / 1.2)
    assert {ratios.pop(getattr(block_parallel, name)) for name in ALONE} == {1}
    assert set(ratios.values()) == {2}
    for way in block_parallel.WAYS.values():
        if way.block_local is not None:
            other = block_parallel.WAYS[way.beside]
            assert way.more_layers == other.more_layers
            own, theirs = (BlockLocalConfig(**each.block_local) for each in (way, other))
            for name in ("head_layers", "head_lens", "balance"):
                assert getattr(own, name) == getattr(theirs, name)


def test_the_table_has_both_heads_or_is_of_an_older_run():
    told = report()
    lines = readme_scaling.block_parallel(told, "here")
    assert "| block-local, 2 processes, default heads | 21.3 | 2.00 [2.00-2.00] | 2.00 [2.00-2.00] | 0%, 0% |" in lines
    assert any("heads of their own if nothing else is said" in line for line in lines)
    told["results"] = [row for row in told["results"] if " heads" not in row["way"]]
    for row in told["results"]:
        del row["beside"]
    older = readme_scaling.block_parallel(told, "here")
    assert "| block-local, 2 processes | 32.0 | 2.00 [2.00-2.00] | 2.00 [2.00-2.00] | 0%, 0% |" in older
    assert not any("default" in line for line in older)
