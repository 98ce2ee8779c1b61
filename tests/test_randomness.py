"""Dropout of a block depends on run, step, micro-batch and block, and on nothing that other blocks draw."""

from __future__ import annotations

import torch
from torch import nn

from hf_blocklocal.randomness import stream_per_block


def masks_of(blocks, *, seed=(1, 2)):
    """Return what three blocks draw, each with a last layer behind it, when only some of them draw."""
    lasts = {block: nn.Identity() for block in (0, 1)}
    drawn = {}
    with stream_per_block(lasts, seed, [torch.device("cpu")]):
        for block in (0, 1, 2):
            if block in blocks:
                drawn[block] = torch.rand(4)
            if block in lasts:
                lasts[block](torch.ones(1))
    return drawn


def test_a_block_draws_the_same_whether_others_draw_or_not():
    together = masks_of({0, 1, 2})
    for block in (0, 1, 2):
        assert torch.equal(masks_of({block})[block], together[block])


def test_blocks_and_seeds_draw_differently():
    first, second = masks_of({0, 1, 2}), masks_of({0, 1, 2}, seed=(1, 3))
    values = [*first.values(), *second.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_the_stream_outside_goes_on_as_if_nothing_had_been_drawn():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    masks_of({0, 2})
    assert torch.equal(torch.rand(3), expected)


def test_a_layer_that_runs_for_another_purpose_leaves_the_stream_alone():
    last = nn.Identity()
    with stream_per_block({0: last}, (1,), [torch.device("cpu")], paused=lambda: True):
        torch.manual_seed(7)
        last(torch.ones(1))
        drawn = torch.rand(2)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(2))
