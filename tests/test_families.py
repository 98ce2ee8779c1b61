"""The closed forms of the families are the sums and integrals that they stand for."""

# Shapes: N targets, C candidates, Z units of the latent, P points of integration.

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from hf_blocklocal.errors import ConfigError
from hf_blocklocal.families import FAMILIES, get_family


def messages(num_forward=5, num_backward=4, units=3, scale=2.0):
    generator = torch.Generator().manual_seed(0)
    a_NZ = scale * torch.randn(num_forward, units, generator=generator)
    b_CZ = scale * torch.randn(num_backward, units, generator=generator)
    return a_NZ, b_CZ


def assert_equal_up_to_a_term_per_row(found_NC, expected_NC):
    difference_NC = found_NC - expected_NC
    torch.testing.assert_close(difference_NC, difference_NC[:, :1].expand_as(difference_NC), rtol=0, atol=1e-4)


def integrated_gaussian_overlap(a_NZ, b_CZ):
    """Integrate the product of the two densities over every unit with the trapezoidal rule."""
    z_P = torch.linspace(-25, 25, 4001, dtype=torch.float64)
    density_NZP = torch.exp(-((z_P - a_NZ[..., None].double()) ** 2) / 2) / math.sqrt(2 * math.pi)
    density_CZP = torch.exp(-((z_P - b_CZ[..., None].double()) ** 2) / 2) / math.sqrt(2 * math.pi)
    integral_NCZ = torch.trapezoid(density_NZP[:, None] * density_CZP[None], z_P)
    return integral_NCZ.log().sum(-1).float()


def summed_bernoulli_overlap(a_NZ, b_CZ):
    """Sum the product of the two probabilities over all 2^Z states."""
    total_NC = torch.zeros(len(a_NZ), len(b_CZ))
    for state in product((0.0, 1.0), repeat=a_NZ.shape[1]):
        state_Z = torch.tensor(state)
        p_N = (torch.sigmoid(a_NZ) * state_Z + torch.sigmoid(-a_NZ) * (1 - state_Z)).prod(-1)
        p_C = (torch.sigmoid(b_CZ) * state_Z + torch.sigmoid(-b_CZ) * (1 - state_Z)).prod(-1)
        total_NC += p_N[:, None] * p_C[None]
    return total_NC.log()


def summed_categorical_overlap(a_NZ, b_CZ):
    """Sum the product of the two probabilities over all Z states."""
    return (a_NZ.softmax(-1)[:, None] * b_CZ.softmax(-1)[None]).sum(-1).log()


def test_the_gaussian_overlap_is_the_integral_up_to_a_term_of_the_forward_message():
    a_NZ, b_CZ = messages()
    assert_equal_up_to_a_term_per_row(
        get_family("gaussian").overlap(a_NZ, b_CZ), integrated_gaussian_overlap(a_NZ, b_CZ)
    )


def test_the_term_left_out_of_the_gaussian_overlap_is_a_quarter_of_the_forward_square():
    a_NZ, b_CZ = messages()
    constant = a_NZ.shape[1] * math.log(4 * math.pi) / 2
    left_out_N1 = a_NZ.square().sum(-1, keepdim=True) / 4 + constant
    found_NC = get_family("gaussian").overlap(a_NZ, b_CZ) - left_out_N1
    torch.testing.assert_close(found_NC, integrated_gaussian_overlap(a_NZ, b_CZ), rtol=1e-4, atol=1e-4)


def test_the_bernoulli_overlap_is_the_sum_over_all_states():
    a_NZ, b_CZ = messages()
    found_NC = get_family("bernoulli").overlap(a_NZ, b_CZ)
    torch.testing.assert_close(found_NC, summed_bernoulli_overlap(a_NZ, b_CZ), rtol=1e-4, atol=1e-5)


def test_the_categorical_overlap_is_the_sum_over_all_states():
    a_NZ, b_CZ = messages()
    found_NC = get_family("categorical").overlap(a_NZ, b_CZ)
    torch.testing.assert_close(found_NC, summed_categorical_overlap(a_NZ, b_CZ), rtol=1e-4, atol=1e-5)


def test_the_categorical_overlap_is_the_difference_of_log_partition_functions():
    a_NZ, b_CZ = messages()
    expected_NC = (a_NZ[:, None] + b_CZ).logsumexp(-1) - a_NZ.logsumexp(-1)[:, None] - b_CZ.logsumexp(-1)
    torch.testing.assert_close(get_family("categorical").overlap(a_NZ, b_CZ), expected_NC, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_large_messages_neither_overflow_nor_lose_their_gradient(name):
    a_NZ, b_CZ = messages(scale=30.0)
    a_NZ.requires_grad_()
    overlap_NC = get_family(name).overlap(a_NZ, b_CZ)
    (gradient_NZ,) = torch.autograd.grad(overlap_NC.sum(), a_NZ)
    assert overlap_NC.isfinite().all()
    assert gradient_NZ.isfinite().all()
    assert (gradient_NZ != 0).any(dim=-1).all()


def test_messages_sure_of_different_classes_still_have_a_gradient():
    a_NZ = torch.tensor([[100.0, 0.0, 0.0]], requires_grad=True)
    b_CZ = torch.tensor([[0.0, 100.0, 0.0]])
    expected_NC = (a_NZ + b_CZ).logsumexp(-1) - a_NZ.logsumexp(-1) - b_CZ.logsumexp(-1)
    overlap_NC = get_family("categorical").overlap(a_NZ, b_CZ)
    (gradient_NZ,) = torch.autograd.grad(overlap_NC.sum(), a_NZ)
    assert (gradient_NZ != 0).any()
    torch.testing.assert_close(overlap_NC.flatten(), expected_NC)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_overlap_of_messages_in_bfloat16_comes_out_in_float32(name):
    a_NZ, b_CZ = messages()
    family = get_family(name)
    found_NC = family.overlap(a_NZ.bfloat16(), b_CZ.bfloat16())
    assert found_NC.dtype == torch.float32
    expected_NC = family.overlap(a_NZ.bfloat16().float(), b_CZ.bfloat16().float())
    torch.testing.assert_close(found_NC, expected_NC, rtol=2e-2, atol=5e-2)


def test_the_gaussian_surprise_is_the_agreement_with_a_message_at_the_observed_value():
    a_NZ, values_NZ = messages(num_backward=5)
    family = get_family("gaussian")
    overlap_N = family.overlap(a_NZ, values_NZ).diagonal() - a_NZ.square().sum(-1) / 4
    torch.testing.assert_close(family.surprise(a_NZ, values_NZ, 0.0), -overlap_N)


def test_the_bernoulli_surprise_is_the_limit_of_agreement_with_ever_surer_messages():
    a_NZ, _ = messages()
    values_NZ = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 0], [0, 0, 0]])
    family = get_family("bernoulli")
    surprise_N = family.surprise(a_NZ, values_NZ, 0.0)
    errors = [
        (family.overlap(a_NZ, sureness * (2 * values_NZ - 1)).diagonal() + surprise_N).abs().max().item()
        for sureness in (2.0, 5.0, 40.0)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


def test_the_categorical_surprise_is_the_limit_of_agreement_with_ever_surer_messages():
    a_NZ, _ = messages()
    values_N = torch.tensor([0, 2, 1, 1, 0])
    family = get_family("categorical")
    surprise_N = family.surprise(a_NZ, values_N, 0.0)
    errors = [
        (family.overlap(a_NZ, sureness * F.one_hot(values_N, 3).float()).diagonal() + surprise_N).abs().max().item()
        for sureness in (2.0, 5.0, 40.0)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


def test_every_family_is_found_by_its_own_name():
    assert set(FAMILIES) == {"gaussian", "bernoulli", "categorical"}
    assert [get_family(name).name for name in FAMILIES] == list(FAMILIES)


def test_an_unknown_family_is_refused_beside_the_known_ones():
    with pytest.raises(ConfigError) as error:
        get_family("vmf")
    assert str(error.value) == ("family='vmf' is not known. Choose one of ['bernoulli', 'categorical', 'gaussian'].")
