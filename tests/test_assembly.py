"""A training loop of one's own: the assembly teaches, and the optimizer has the rates of its blocks."""

from __future__ import annotations

import pytest
import torch
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.errors import TargetError


def assembled(name, **options):
    specimen = SPECIMENS[name]
    torch.manual_seed(0)
    model, batch = specimen.build(), specimen.batch(0)
    return model, batch, assemble(model, BlockLocalConfig(**options), batch)


def gradients_of(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_loop_of_ones_own_needs_three_lines(name):
    model, batch, assembly = assembled(name, num_blocks=3)
    optimizer = torch.optim.SGD(assembly.module.parameters(), lr=0.5)
    losses = []
    for step in range(8):
        with assembly.teach(batch, step=step) as report:
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(torch.stack(report.losses))
    assert len(losses[0]) == 2
    assert (losses[-1] < losses[0]).all()


def test_it_teaches_as_the_step_does_with_means_over_the_targets():
    model, batch, assembly = assembled("bert", num_blocks=2)
    model.eval()  # no dropout
    targets = assembly.read_targets(batch)
    with assembly.step.teach(targets, scale=0.5 / targets.elements, inputs=batch):
        (0.5 * model(**batch).loss).backward()
    expected = gradients_of(model)
    model.zero_grad()
    with assembly.teach(batch, step=0, accumulation_steps=2):
        (0.5 * model(**batch).loss).backward()
    assert expected.keys() == gradients_of(model).keys()
    assert all(gradient.equal(expected[name]) for name, gradient in gradients_of(model).items())


def test_a_block_may_be_stepped_at_once():
    model, batch, assembly = assembled("bert", num_blocks=2)
    done = []
    with assembly.teach(batch, step=0, learned=lambda block, report: done.append((block, len(report.losses)))):
        model(**batch).loss.backward()
    assert done == [(0, 1)]


def test_copies_that_are_due_are_taken():
    model, batch, assembly = assembled("gpt2", num_blocks=2, head_copies="frozen", head_refresh_steps=2)
    name, before = next(iter(assembly.copies.state().items()))
    before = before.clone()
    optimizer = torch.optim.SGD(assembly.module.parameters(), lr=0.5)
    changed = []
    for step in range(6):
        with assembly.teach(batch, step=step):
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        changed.append(not assembly.copies.state()[name].equal(before))
    assert changed[0] is False
    assert changed[-1] is True


def test_with_a_single_block_it_is_backpropagation():
    model, batch, assembly = assembled("bert", num_blocks=1)
    model.eval()
    model(**batch).loss.backward()
    expected = gradients_of(model)
    model.zero_grad()
    with assembly.teach(batch, step=0) as report:
        model(**batch).loss.backward()
    assert report.losses == []
    assert all(gradient.equal(expected[name]) for name, gradient in gradients_of(model).items())


def test_a_batch_without_a_label_that_counts_is_refused():
    model, batch, assembly = assembled("gpt2", num_blocks=2)
    batch = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(TargetError, match="No label of this batch counts"), assembly.teach(batch, step=0):
        model(**batch)
