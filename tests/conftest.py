"""What every test starts from: one thread, no network, and tiny models to borrow."""

from __future__ import annotations

import gc
import os
from collections import Counter


os.environ["HF_HUB_OFFLINE"] = "1"

import copy  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from zoo import SPECIMENS  # noqa: E402


torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Start a worker for each core that may be used, at most 8, as each takes about a gigabyte of memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 8)


def pytest_collection_modifyitems(items):
    """Put files that take long first, so that no worker is left alone with one in the end."""
    tests = Counter(item.path for item in items)
    launched = {item.path for item in items if item.get_closest_marker("launch")}
    items.sort(key=lambda item: (item.path not in launched, -tests[item.path]))


def pytest_collection_finish():
    """Let the collector of garbage pass over all that has been imported: every training run calls it."""
    gc.freeze()


@pytest.fixture(scope="session")
def originals():
    """The models built so far, by name of specimen. Nobody may change them."""
    return {}


@pytest.fixture
def borrow(originals):
    """Lend a specimen's model: a copy of one's own, free to be changed."""

    def lend(name):
        if name not in originals:
            originals[name] = SPECIMENS[name].build()
        return copy.deepcopy(originals[name])

    return lend


@pytest.fixture
def environment():
    """Forget what training arguments leave in the environment, where later runs would find it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
