"""The bound is a bound: on models small enough to sum, no message takes the loss below the cost of the target."""

# Shapes: N inputs, P states or points of the latent, Z units, C targets.

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch

from hf_blocklocal.losses.families import FAMILIES, get_family


N, Z, C = 6, 3, 4
SEEDS = range(5)
EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)
EVERY_SEED = pytest.mark.parametrize("seed", SEEDS)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def space(name):
    """Return the latent's states or points of integration, (P, Z), and the log of their base measure, (P,)."""
    if name == "categorical":
        return torch.eye(Z), torch.zeros(Z)
    if name == "bernoulli":
        return torch.tensor(list(product((0.0, 1.0), repeat=Z))), torch.zeros(2**Z)
    if name == "vmf":
        num = 60
        heights, weights = (torch.from_numpy(values).float() for values in np.polynomial.legendre.leggauss(num))
        turns, radii = torch.arange(num) * (2 * math.pi / num), (1 - heights.square()).sqrt()
        sides = [radii[:, None] * turns.cos(), radii[:, None] * turns.sin(), heights[:, None].expand(num, num)]
        return torch.stack(sides, -1).reshape(-1, Z), (weights / (2 * num)).log().repeat_interleave(num)
    line = torch.linspace(-8, 8, 49)
    z_PZ = torch.cartesian_prod(*[line] * Z)
    return z_PZ, Z * math.log(16 / 48) - (z_PZ.square().sum(-1) + Z * math.log(2 * math.pi)) / 2


class TinyModel:
    """`p(z | x)` of a family and a `p(y | z)` of no family: whatever a network says of every state."""

    def __init__(self, name, seed):
        self.family, (self.z_PZ, self.base_P) = get_family(name), space(name)
        self.cell_P = torch.zeros(())  # log of what a density is multiplied by to become the probability of a point
        if name == "gaussian":
            self.cell_P = Z * math.log(16 / 48)
        elif name == "vmf":
            self.cell_P = self.base_P
        self.a_NZ = normal(N, Z, seed=seed)
        hidden_PH = torch.tanh(self.z_PZ @ normal(Z, 8, seed=seed + 100))
        log_likelihood_PC = (2 * hidden_PH @ normal(8, C, seed=seed + 200)).log_softmax(-1)
        self.log_likelihood_NP = log_likelihood_PC.T[torch.arange(N) % C]

    def log_p(self, t_NZ):
        """Return the log of the probability of every point, (N, P), under the message of these parameters."""
        return t_NZ @ self.z_PZ.T + self.base_P - self.family.log_partition(t_NZ)[:, None]

    def log_posterior(self, b_NZ):
        """Return the log of the product of both messages, normalised, (N, P)."""
        return (self.log_p(self.a_NZ) + self.log_p(b_NZ) - self.cell_P).log_softmax(-1)

    def cost(self, log_likelihood_NP):
        """Return `-log p(y | x)`, (N,), by summing over the latent."""
        return -(self.log_p(self.a_NZ) + log_likelihood_NP).logsumexp(-1)

    def bound(self, b_NZ, log_likelihood_NP):
        """Return `KL(q || alpha)` in closed form plus `E_q[-log p(y | z)]` summed, q being the posterior of b."""
        return self.family.halves(self.a_NZ, b_NZ)[0] - expectation(self.log_posterior(b_NZ), log_likelihood_NP)


def expectation(log_q_NP, values_NP):
    return (log_q_NP.exp() * values_NP).sum(-1)


@EVERY_FAMILY
def test_the_messages_are_distributions_over_the_points(name):
    model = TinyModel(name, 0)
    torch.testing.assert_close(model.log_p(model.a_NZ).logsumexp(-1), torch.zeros(N), rtol=0, atol=1e-4)


@EVERY_SEED
@EVERY_FAMILY
def test_whatever_the_likelihood_no_message_takes_the_bound_below_the_cost_of_the_target(name, seed):
    model = TinyModel(name, seed)
    cost_N = model.cost(model.log_likelihood_NP)
    for scale in (0.0, 0.5, 3.0):
        gap_N = model.bound(scale * normal(N, Z, seed=seed + 300), model.log_likelihood_NP) - cost_N
        assert (gap_N >= -1e-4).all()
        assert gap_N.max() > 1e-3


@EVERY_SEED
@EVERY_FAMILY
def test_the_gap_is_the_divergence_from_the_true_posterior(name, seed):
    model = TinyModel(name, seed)
    log_true_NP = (model.log_p(model.a_NZ) + model.log_likelihood_NP).log_softmax(-1)
    b_NZ = normal(N, Z, seed=seed + 300)
    log_q_NP = model.log_posterior(b_NZ)
    gap_N = model.bound(b_NZ, model.log_likelihood_NP) - model.cost(model.log_likelihood_NP)
    torch.testing.assert_close(gap_N, expectation(log_q_NP, log_q_NP - log_true_NP), rtol=1e-3, atol=1e-4)


@EVERY_SEED
@EVERY_FAMILY
def test_where_the_message_is_the_likelihood_the_loss_is_the_cost_of_the_target_and_any_other_message_costs_more(
    name, seed
):
    model = TinyModel(name, seed)
    true_NZ, other_NZ = normal(N, Z, seed=seed + 300), normal(N, Z, seed=seed + 400)
    # A density, which a constant common to both sides of every comparison would make a probability.
    log_likelihood_NP = model.log_p(true_NZ) - model.cell_P
    cost_N = model.cost(log_likelihood_NP)
    kl_N, surprise_N = model.family.halves(model.a_NZ, true_NZ)
    torch.testing.assert_close(kl_N + surprise_N, cost_N, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.bound(true_NZ, log_likelihood_NP), cost_N, rtol=1e-4, atol=1e-4)
    for share in (0.25, 0.5, 1.0):
        gap_N = model.bound(true_NZ.lerp(other_NZ, share), log_likelihood_NP) - cost_N
        assert (gap_N >= -1e-4).all()
        assert gap_N.max() > 1e-3
