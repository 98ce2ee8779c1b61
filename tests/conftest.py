"""What every test starts from: one thread, no network, and tiny models to borrow."""

from __future__ import annotations

import os


os.environ["HF_HUB_OFFLINE"] = "1"

import copy  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from zoo import SPECIMENS  # noqa: E402


torch.set_num_threads(1)


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
