"""The closed forms of the families are the sums and integrals that they stand for."""

# Shapes: N targets, C candidates, Z units of the latent, P points of integration.

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal, VonMises, kl_divergence
from torch.nn import functional as F

from hf_blocklocal.errors import ConfigError
from hf_blocklocal.losses.families import FAMILIES, get_family


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


def sphere(num=200):
    """Return points on the ordinary sphere, (P, 3), and their weights in the uniform distribution, (P,)."""
    heights, weights = (torch.from_numpy(values).float() for values in np.polynomial.legendre.leggauss(num))
    turns = torch.arange(num) * (2 * math.pi / num)
    radii = (1 - heights.square()).sqrt()
    sides = [radii[:, None] * turns.cos(), radii[:, None] * turns.sin(), heights[:, None].expand(num, num)]
    return torch.stack(sides, -1).reshape(-1, 3), weights.repeat_interleave(num) / (2 * num)


def integrated_vmf_overlap(a_NZ, b_CZ):
    """Integrate the product of the two densities over the sphere, normalised by integrals themselves."""
    z_PZ, weights_P = sphere()
    log_weights_P = weights_P.log()

    def log_density(t_MZ):
        exponent_MP = t_MZ @ z_PZ.T
        return exponent_MP - (exponent_MP + log_weights_P).logsumexp(-1, keepdim=True)

    return (log_density(a_NZ)[:, None] + log_density(b_CZ) + log_weights_P).logsumexp(-1)


OVERLAPS = {
    "gaussian": integrated_gaussian_overlap,
    "bernoulli": summed_bernoulli_overlap,
    "categorical": summed_categorical_overlap,
    "vmf": integrated_vmf_overlap,
}


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


def test_the_vmf_overlap_is_the_integral_over_the_sphere():
    a_NZ, b_CZ = messages()
    found_NC = get_family("vmf").overlap(a_NZ, b_CZ)
    torch.testing.assert_close(found_NC, integrated_vmf_overlap(a_NZ, b_CZ), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("units", [2, 3, 128, 1000])
def test_the_vmf_overlap_is_the_difference_of_log_partition_functions(units):
    family, (a_NZ, b_CZ) = get_family("vmf"), messages(units=units)
    sum_NC = family.log_partition((a_NZ[:, None] + b_CZ).flatten(0, 1)).view(5, 4)
    expected_NC = sum_NC - family.log_partition(a_NZ)[:, None] - family.log_partition(b_CZ)
    torch.testing.assert_close(family.overlap(a_NZ, b_CZ), expected_NC, rtol=1e-4, atol=1e-3)


def test_vmf_messages_that_cancel_have_the_overlap_of_a_posterior_that_knows_nothing():
    a_NZ, _ = messages(units=128)
    family = get_family("vmf")
    a_NZ.requires_grad_()
    overlap_N = family.overlap(a_NZ, -a_NZ.detach()).diagonal()
    torch.testing.assert_close(overlap_N, -2 * family.log_partition(a_NZ), rtol=1e-5, atol=1e-4)
    (gradient_NZ,) = torch.autograd.grad(overlap_N.sum(), a_NZ)
    torch.testing.assert_close(gradient_NZ, -family.mean(a_NZ), rtol=1e-4, atol=1e-4)


def test_over_many_candidates_vmf_keeps_no_tensor_larger_than_the_scores_for_backward():
    a_NZ, b_CZ = messages(num_forward=30, num_backward=40, units=50)
    a_NZ.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        get_family("vmf").overlap(a_NZ, b_CZ)
    assert max(kept) <= 50 * 40
    assert sum(size == 30 * 40 for size in kept) <= 2


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


def test_the_vmf_surprise_is_the_limit_of_agreement_with_ever_surer_messages():
    a_NZ, values_NZ = messages(num_backward=5)
    directions_NZ = F.normalize(values_NZ, dim=-1)
    family = get_family("vmf")
    surprise_N = family.surprise(a_NZ, values_NZ, 0.0)
    errors = [
        (family.overlap(a_NZ, sureness * directions_NZ).diagonal() + surprise_N).abs().max().item()
        for sureness in (10.0, 100.0, 1000.0)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3 * a_NZ.square().sum(-1).max()  # |a|^2 over the sureness


# ---- The posterior, and the two halves of the agreement ----


def paired_messages():
    return messages(num_forward=6, num_backward=6)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_mean_is_the_gradient_of_the_log_partition_function(name):
    family, (t_NZ, _) = get_family(name), messages()
    t_NZ.requires_grad_()
    (gradient_NZ,) = torch.autograd.grad(family.log_partition(t_NZ).sum(), t_NZ)
    torch.testing.assert_close(family.mean(t_NZ), gradient_NZ)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_halves_sum_to_minus_the_log_of_the_overlap(name):
    a_NZ, b_NZ = paired_messages()
    expected_N = -OVERLAPS[name](a_NZ, b_NZ).diagonal()
    torch.testing.assert_close(sum(get_family(name).halves(a_NZ, b_NZ)), expected_N, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_half_is_a_divergence_that_vanishes_only_where_the_target_says_nothing(name):
    family, (a_NZ, b_NZ) = get_family(name), paired_messages()
    kl_N, _ = family.halves(a_NZ, b_NZ)
    silent_N, _ = family.halves(a_NZ, a_NZ if name == "gaussian" else torch.zeros_like(b_NZ))
    # A Gaussian message is never silent: its width alone makes the posterior narrower.
    expected = a_NZ.shape[1] * (math.log(2) / 2 - 1 / 4) if name == "gaussian" else 0.0
    assert (kl_N > 1e-2).all()
    torch.testing.assert_close(silent_N, torch.full_like(silent_N, expected), rtol=1e-5, atol=1e-5)


def test_the_gaussian_halves_are_those_of_normal_distributions():
    family, (a_NZ, b_NZ) = get_family("gaussian"), paired_messages()
    rho = Normal(family.mean(family.posterior(a_NZ, b_NZ)), 0.5**0.5)
    points_K, weights_K = (torch.from_numpy(values).float() for values in np.polynomial.hermite.hermgauss(20))
    log_beta_NZK = Normal(b_NZ[..., None], 1.0).log_prob(rho.mean[..., None] + points_K)
    second_N = -(log_beta_NZK @ weights_K).sum(-1) / math.sqrt(math.pi)
    first_N = kl_divergence(rho, Normal(a_NZ, 1.0)).sum(-1)
    torch.testing.assert_close(family.halves(a_NZ, b_NZ), (first_N, second_N), rtol=1e-4, atol=1e-4)


def test_the_bernoulli_halves_are_those_of_bernoulli_distributions():
    family, (a_NZ, b_NZ) = get_family("bernoulli"), paired_messages()
    rho, beta = Bernoulli(logits=family.posterior(a_NZ, b_NZ)), Bernoulli(logits=b_NZ)
    first_N = kl_divergence(rho, Bernoulli(logits=a_NZ)).sum(-1)
    second_N = (kl_divergence(rho, beta) + rho.entropy()).sum(-1)
    torch.testing.assert_close(family.halves(a_NZ, b_NZ), (first_N, second_N), rtol=1e-4, atol=1e-4)


def test_the_categorical_halves_are_those_of_categorical_distributions():
    family, (a_NZ, b_NZ) = get_family("categorical"), paired_messages()
    rho, beta = Categorical(logits=family.posterior(a_NZ, b_NZ)), Categorical(logits=b_NZ)
    expected = (kl_divergence(rho, Categorical(logits=a_NZ)), kl_divergence(rho, beta) + rho.entropy())
    torch.testing.assert_close(family.halves(a_NZ, b_NZ), expected, rtol=1e-4, atol=1e-4)


def test_on_the_circle_the_vmf_halves_are_those_of_von_mises_distributions():
    family, (a_N2, b_N2) = get_family("vmf"), messages(num_forward=6, num_backward=6, units=2)
    angles_P = torch.arange(2000) * (2 * math.pi / 2000) - math.pi

    def log_density(t_N2):
        """Return the log density of each angle, (N, P), against the uniform distribution on the circle."""
        angle_N1, sureness_N1 = torch.atan2(t_N2[:, 1:], t_N2[:, :1]), t_N2.norm(dim=-1, keepdim=True)
        return VonMises(angle_N1, sureness_N1).log_prob(angles_P) + math.log(2 * math.pi)

    log_rho_NP = log_density(family.posterior(a_N2, b_N2))
    first_N = (log_rho_NP.exp() * (log_rho_NP - log_density(a_N2))).mean(-1)
    second_N = -(log_rho_NP.exp() * log_density(b_N2)).mean(-1)
    torch.testing.assert_close(family.halves(a_N2, b_N2), (first_N, second_N), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_halves_of_messages_in_bfloat16_come_out_in_float32_and_teach_both_messages(name):
    a_NZ, b_NZ = (message.bfloat16().requires_grad_() for message in paired_messages())
    halves = get_family(name).halves(a_NZ, b_NZ)
    assert [half_N.dtype for half_N in halves] == [torch.float32] * 2
    for gradient_NZ in torch.autograd.grad(sum(halves).sum(), (a_NZ, b_NZ)):
        assert (gradient_NZ != 0).any(-1).all()


def test_every_family_is_found_by_its_own_name():
    assert set(FAMILIES) == {"gaussian", "bernoulli", "categorical", "vmf"}
    assert [get_family(name).name for name in FAMILIES] == list(FAMILIES)


def test_an_unknown_family_is_refused_beside_the_known_ones():
    with pytest.raises(ConfigError) as error:
        get_family("laplace")
    assert str(error.value) == (
        "family='laplace' is not known. Choose one of ['bernoulli', 'categorical', 'gaussian', 'vmf']."
    )
