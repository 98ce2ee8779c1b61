"""The meter sums over micro-batches and divides by optimizer steps."""

from __future__ import annotations

import pytest
import torch

from hf_blocklocal.records.meters import BlockLossMeter


CPU = torch.device("cpu")


def losses(*values, dtype=torch.float32):
    return [torch.tensor(value, dtype=dtype) for value in values]


def pop(meter, num_blocks=2):
    return meter.pop(num_blocks, CPU, world_size=1)


def test_micro_batches_are_summed_and_steps_are_averaged():
    meter = BlockLossMeter()
    for first, second, completes in [(1.0, 2.0, False), (3.0, 4.0, True), (5.0, 0.0, False), (7.0, 2.0, True)]:
        meter.add(losses(first, second), completes_step=completes)
    assert pop(meter) == {"block_0/loss": 16 / 2, "block_1/loss": 8 / 2}


def test_a_log_starts_anew():
    meter = BlockLossMeter()
    meter.add(losses(10.0, 20.0), completes_step=True)
    pop(meter)
    meter.add(losses(1.0, 2.0), completes_step=True)
    assert pop(meter) == {"block_0/loss": 1.0, "block_1/loss": 2.0}


def test_every_block_has_its_name_even_if_nothing_was_added():
    assert pop(BlockLossMeter(), 3) == {"block_0/loss": 0.0, "block_1/loss": 0.0, "block_2/loss": 0.0}


def test_losses_in_half_precision_are_summed_in_full():
    meter = BlockLossMeter()
    for _ in range(300):
        meter.add(losses(1.0, 1.0, dtype=torch.bfloat16), completes_step=False)
    assert pop(meter)["block_0/loss"] == 300.0


def test_skipped_micro_batches_are_counted_and_complete_their_steps():
    meter = BlockLossMeter()
    meter.add(losses(3.0, 6.0), completes_step=True)
    meter.skip(completes_step=False)
    meter.skip(completes_step=True)
    assert meter.skipped_batches == 2
    assert pop(meter) == {"block_0/loss": 1.5, "block_1/loss": 3.0, "skipped_batches": 2}


def test_the_last_block_is_averaged_over_all_steps_and_the_others_over_those_they_had():
    meter = BlockLossMeter()
    meter.add(losses(1.0, 2.0), completes_step=True)
    meter.add(losses(3.0, 2.0), completes_step=True)
    meter.add_global(torch.tensor(4.0), completes_step=False)
    meter.add_global(torch.tensor(4.0), completes_step=True)
    assert pop(meter) == {"block_0/loss": 2.0, "block_1/loss": 4.0}
    meter.add(losses(1.0, 2.0), completes_step=True)
    assert pop(meter) == {"block_0/loss": 1.0, "block_1/loss": 2.0}


def test_blocks_that_had_no_loss_are_left_out():
    meter = BlockLossMeter()
    meter.add_global(torch.tensor(4.0), completes_step=True)
    meter.skip(completes_step=True, in_global_step=True)
    assert pop(meter, 3) == {"block_2/loss": 2.0, "skipped_batches": 1}


@pytest.mark.parametrize("skipped", [0, 1])
def test_nothing_is_said_of_skipping_where_nothing_was_skipped(skipped):
    meter = BlockLossMeter()
    for _ in range(skipped):
        meter.skip(completes_step=True)
    assert ("skipped_batches" in pop(meter)) == bool(skipped)


def test_steps_that_blocks_have_left_out_are_told_as_they_are_counted():
    meter, alone = BlockLossMeter(), BlockLossMeter(alone=1)
    meter.add(losses(1.0, 2.0), completes_step=True)
    alone.add(losses(2.0), completes_step=True)
    counts = {block: torch.tensor(float(count)) for block, count in enumerate([0, 3])}
    told = meter.pop(2, CPU, world_size=1, overflows=counts)
    assert told == {"block_0/loss": 1.0, "block_1/loss": 2.0, "block_1/overflows": 3.0}
    assert alone.pop(2, CPU, world_size=1, overflows={1: counts[1]})["block_1/overflows"] == 6.0  # of two processes


def test_halves_are_means_over_targets_and_do_not_mix_with_steps():
    meter = BlockLossMeter()
    first, second = torch.tensor([6.0, 2.0]), torch.tensor([4.0, 8.0])
    meter.add(losses(1.0, 2.0), halves=[first], targets=3, completes_step=False)
    meter.add(losses(1.0, 2.0), halves=[second], targets=7, completes_step=True)
    assert pop(meter) == {"block_0/loss": 2.0, "block_1/loss": 4.0, "block_0/kl": 1.0, "block_0/nll": 1.0}
    assert pop(meter) == {"block_0/loss": 0.0, "block_1/loss": 0.0}


def test_each_block_has_its_own_halves():
    meter = BlockLossMeter()
    halves = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    meter.add(losses(0.0, 0.0, 0.0), halves=halves, targets=1, completes_step=True)
    found = pop(meter, 3)
    assert [found[f"block_{block}/{half}"] for block in (0, 1) for half in ("kl", "nll")] == [1.0, 2.0, 3.0, 4.0]
