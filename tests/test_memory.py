"""The meters count to the byte, see what they promise to see, and disturb nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.records.memory import ActivationMeter, TensorMeter


SIDE = 16
# Bytes of a SIDE x SIDE matrix of float32.
MATRIX = SIDE * SIDE * 4


def matrices(count):
    generator = torch.Generator().manual_seed(0)
    return nn.ParameterList(torch.randn(SIDE, SIDE, generator=generator) / 4 for _ in range(count))


def chain(hidden, weights):
    for weight in weights:
        hidden = hidden @ weight
    return hidden


def saved_peak(name, num_blocks, head_layers=0):
    """Bytes saved at most in one step of a specimen cut into blocks."""
    specimen = SPECIMENS[name]
    model, batch = specimen.build(), specimen.batch(0)
    assembly = assemble(model, BlockLocalConfig(num_blocks=num_blocks, head_layers=head_layers), batch)
    targets = assembly.read_targets(batch)
    lesson = assembly.step.teach(
        targets, inputs=batch, scale=1.0, backward=torch.Tensor.backward, learned=lambda *_: None
    )
    with ActivationMeter(assembly.module) as meter, lesson:
        model(**batch).loss.backward()
    assert meter.live_bytes == 0
    return meter.peak_bytes


def test_a_chain_of_products_saves_the_left_factor_of_each():
    weights = matrices(5)
    with ActivationMeter(weights) as meter:
        output = chain(torch.randn(SIDE, SIDE), weights)
        assert meter.live_bytes == 5 * MATRIX
        output.sum().backward()
    assert meter.peak_bytes == 5 * MATRIX
    assert meter.live_bytes == 0


def test_parameters_count_where_no_module_is_given():
    weights = matrices(5)
    with ActivationMeter() as meter:
        chain(torch.randn(SIDE, SIDE), weights).sum().backward()
    # The first weight is not saved: nothing asks for the gradient of the input.
    assert meter.peak_bytes == (5 + 4) * MATRIX


def test_views_of_one_storage_count_once_and_whole():
    inputs, weight = torch.randn(4 * SIDE, SIDE), nn.Parameter(torch.ones(SIDE))
    with ActivationMeter(nn.ParameterList([weight])) as meter:
        products = [row * weight for row in (inputs[0], inputs[1], inputs[1].view(4, 4).flatten())]
        assert meter.live_bytes == 4 * MATRIX
        products[0].sum().backward()
        assert meter.live_bytes == 4 * MATRIX
        del products
    assert meter.live_bytes == 0
    assert meter.peak_bytes == 4 * MATRIX


def test_a_backward_pass_inside_the_forward_pass_frees_what_it_used():
    weights = matrices(6)
    with ActivationMeter(weights) as meter:
        hidden = torch.randn(SIDE, SIDE)
        for start in (0, 2, 4):
            hidden = chain(hidden, weights[start : start + 2])
            hidden.sum().backward()
            assert meter.live_bytes == 0
            hidden = hidden.detach()
    assert meter.peak_bytes == 2 * MATRIX


def test_what_outlives_the_with_is_still_given_back():
    weights = matrices(2)
    with ActivationMeter(weights) as meter, TensorMeter() as tensors:
        loss = chain(torch.randn(SIDE, SIDE), weights).sum()
    assert meter.live_bytes == 2 * MATRIX
    loss.backward()
    del loss
    assert meter.live_bytes == tensors.live_bytes == 0


def test_tensor_meter_counts_what_is_alive_and_not_what_was_there():
    before = torch.ones(SIDE, SIDE)
    with TensorMeter() as meter:
        view = before.view(-1)
        view.add_(1)
        assert meter.live_bytes == 0
        double = before * 2
        part = double[0]
        del double
        assert meter.live_bytes == MATRIX
        both = part + before
        del part
        assert meter.live_bytes == MATRIX
    assert meter.peak_bytes == 2 * MATRIX
    del both
    assert meter.live_bytes == 0


def test_tensor_meter_counts_gradients_and_temporaries():
    weights = matrices(3)
    with TensorMeter() as meter:
        loss = chain(torch.randn(SIDE, SIDE), weights).square().sum()
        loss.backward()
        del loss
    assert meter.live_bytes == 3 * MATRIX
    assert meter.peak_bytes > 6 * MATRIX
    for weight in weights:
        weight.grad = None
    assert meter.live_bytes == 0


def test_checkpointing_is_seen_by_tensor_meter_only():
    weights = matrices(8)

    def run(checkpointed):
        hidden = torch.randn(SIDE, SIDE)
        for weight in weights:
            weight.grad = torch.zeros_like(weight)  # so that gradients do not come on top
        with ActivationMeter(weights) as saved, TensorMeter() as alive:
            for start in (0, 4):
                part = weights[start : start + 4]
                hidden = checkpoint(chain, hidden, part, use_reentrant=False) if checkpointed else chain(hidden, part)
            hidden.sum().backward()
            del hidden
        assert saved.live_bytes == alive.live_bytes == 0
        return saved.peak_bytes, alive.peak_bytes

    (plain_saved, plain_alive), (saved, alive) = run(False), run(True)
    assert plain_saved == 8 * MATRIX
    assert saved < 3 * MATRIX
    assert 4 * MATRIX < alive < plain_alive - 2 * MATRIX


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_more_blocks_save_less_at_once(name):
    one, two, four = (saved_peak(name, num_blocks) for num_blocks in (1, 2, 4))
    assert four < two < one


def test_blocks_of_a_classifier_need_their_share_and_a_tenth():
    plain = saved_peak("bert", 1)
    for num_blocks in (2, 4):
        assert saved_peak("bert", num_blocks) <= (1 / num_blocks + 0.10) * plain
        borrowed = saved_peak("bert", num_blocks, head_layers=1)  # of the four layers
        assert borrowed <= (1 / num_blocks + 1 / 4 + 0.10) * plain


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_meters_change_no_bit(name):
    specimen = SPECIMENS[name]

    def gradients(*meters):
        model = specimen.build()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        torch.manual_seed(0)
        for meter in meters:
            meter.__enter__()
        loss = model.train()(**specimen.batch(0)).loss
        loss.backward()
        for meter in reversed(meters):
            meter.__exit__(None, None, None)
        return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]

    plain, metered = gradients(), gradients(ActivationMeter(), TensorMeter())
    assert len(plain) == len(metered)
    assert all(torch.equal(*pair) for pair in zip(plain, metered, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_meters_count_on_a_gpu_what_its_allocator_does():
    weights = matrices(4).cuda()
    inputs = torch.randn(SIDE, SIDE, device="cuda")
    chain(inputs, weights).sum().backward()  # lets the libraries take their workspaces
    weights.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with ActivationMeter(weights) as saved, TensorMeter() as alive:
        loss = chain(inputs, weights).sum()
        loss.backward()
        del loss
    assert saved.peak_bytes == 4 * MATRIX
    assert saved.live_bytes == 0
    assert alive.live_bytes == 4 * MATRIX
    # Blocks of the allocator are multiples of 512 bytes.
    assert alive.peak_bytes <= torch.cuda.max_memory_allocated() - before <= alive.peak_bytes + 20 * 512
