"""The exponential families of the messages between input and target.

A family says how well two messages agree: the logarithm of the overlap of the forward message `alpha` (natural
parameters a) and the backward message `beta` (natural parameters b), summed over the units of the latent, and what
remains of it when beta is a point mass at an observed target. Formulas: Kappel et al. 2023 (arXiv 2305.14974) read as
in docs/teaching.md; `overlap` and `surprise` leave out constants that neither message can change.

The posterior rho is the normalised product of the two messages. With it the agreement splits into two halves that can
be read apart, the first of which is what the target tells the block that it did not know:

    -log Z(a, b) = KL(rho || alpha) + E_rho[-log beta]
"""

# Shapes: N targets, C candidates, Z units of the latent.

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from hf_blocklocal.errors import ConfigError
from hf_blocklocal.losses.bessel import log_partition_of_square, mean_over_parameter


class Family(Protocol):
    """What a loss needs to know of an exponential family."""

    name: str

    def overlap(self, a_NZ: Tensor, b_CZ: Tensor) -> Tensor:
        """Return `log Z(a_n, b_c)` for every pair, (N, C), up to a term that depends on a alone."""

    def surprise(self, a_NZ: Tensor, values: Tensor, label_smoothing: float) -> Tensor:
        """Return the agreement loss, (N,), when beta is a point mass at the observed values."""

    def log_partition(self, t_NZ: Tensor) -> Tensor:
        """Return `A(t)`, (N,), which normalises `exp(<t, z>)` against the base measure."""

    def mean(self, t_NZ: Tensor) -> Tensor:
        """Return the mean of the latent, (N, Z), the gradient of `A`."""

    def posterior(self, a_NZ: Tensor, b_NZ: Tensor, weight: float = 1.0) -> Tensor:
        """Return the parameters, (N, Z), of which `mean` makes the mean of rho, or of `alpha beta^weight` likewise."""

    def halves(self, a_NZ: Tensor, b_NZ: Tensor) -> tuple[Tensor, Tensor]:
        """Return `KL(rho || alpha)` and `E_rho[-log beta]`, (N,) each, which sum to `-log Z(a_n, b_n)` in full."""


class _Natural(ABC):
    """What follows from `A` alone where densities are `exp(<t, z> - A(t))` and t adds up under products."""

    @abstractmethod
    def log_partition(self, t_NZ: Tensor) -> Tensor:
        """Return `A(t)`, (N,)."""

    @abstractmethod
    def mean(self, t_NZ: Tensor) -> Tensor:
        """Return the gradient of `A`, (N, Z)."""

    def posterior(self, a_NZ: Tensor, b_NZ: Tensor, weight: float = 1.0) -> Tensor:
        """Return `a + weight b`."""
        return a_NZ.float() + weight * b_NZ.float()

    def halves(self, a_NZ: Tensor, b_NZ: Tensor) -> tuple[Tensor, Tensor]:
        """Return `<b, m> - A(a + b) + A(a)` and `A(b) - <b, m>`, m being the mean of the posterior."""
        rho_NZ = self.posterior(a_NZ, b_NZ)
        reward_N = (b_NZ.float() * self.mean(rho_NZ)).sum(-1)
        return (
            reward_N - self.log_partition(rho_NZ) + self.log_partition(a_NZ),
            self.log_partition(b_NZ) - reward_N,
        )


class Gaussian:
    """Unit-variance normal latents: `log Z(a, b) = -(a - b)^2 / 4` per unit.

    Messages are the densities N(a, 1) and N(b, 1), so their product is narrower than either: rho is
    N((a + b) / 2, 1/2) and does not belong to the family. The base measure of `log_partition` is N(0, 1).
    """

    name = "gaussian"

    def overlap(self, a_NZ: Tensor, b_CZ: Tensor) -> Tensor:
        """Return `a b / 2 - b^2 / 4` summed over units: the overlap without `a^2 / 4`."""
        return (a_NZ / 2 @ b_CZ.T).float() - b_CZ.float().square().sum(-1) / 4

    def surprise(self, a_NZ: Tensor, values: Tensor, label_smoothing: float) -> Tensor:
        """Return `(a - y)^2 / 4` summed over units."""
        return (a_NZ.float() - values.float()).square().sum(-1) / 4

    def log_partition(self, t_NZ: Tensor) -> Tensor:
        """Return `t^2 / 2` summed over units."""
        return t_NZ.float().square().sum(-1) / 2

    def mean(self, t_NZ: Tensor) -> Tensor:
        """Return t itself."""
        return t_NZ.float()

    def posterior(self, a_NZ: Tensor, b_NZ: Tensor, weight: float = 1.0) -> Tensor:
        """Return `(a + weight b) / (1 + weight)`, the mean of the posterior; its variance is `1 / (1 + weight)`."""
        return (a_NZ.float() + weight * b_NZ.float()) / (1 + weight)

    def halves(self, a_NZ: Tensor, b_NZ: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(a - b)^2 / 8` summed over units, twice, with the constants that make each of them exact."""
        eighth_N = (a_NZ.float() - b_NZ.float()).square().sum(-1) / 8
        units = a_NZ.shape[-1]
        return (
            eighth_N + units * (math.log(2) / 2 - 1 / 4),
            eighth_N + units * (math.log(2 * math.pi) / 2 + 1 / 4),
        )


class Bernoulli(_Natural):
    """Binary latents with logits a: `log Z(a, b) = softplus(a + b) - softplus(a) - softplus(b)` per unit."""

    name = "bernoulli"

    def overlap(self, a_NZ: Tensor, b_CZ: Tensor) -> Tensor:
        """Return the overlap summed over units; takes memory for all N x C x Z."""
        a_N1Z, b_CZ = a_NZ.float().unsqueeze(1), b_CZ.float()
        return (F.softplus(a_N1Z + b_CZ) - F.softplus(a_N1Z) - F.softplus(b_CZ)).sum(-1)

    def surprise(self, a_NZ: Tensor, values: Tensor, label_smoothing: float) -> Tensor:
        """Return the binary cross-entropy of the labels, summed over units."""
        return F.binary_cross_entropy_with_logits(a_NZ.float(), values.float(), reduction="none").sum(-1)

    def log_partition(self, t_NZ: Tensor) -> Tensor:
        """Return `softplus(t)` summed over units."""
        return F.softplus(t_NZ.float()).sum(-1)

    def mean(self, t_NZ: Tensor) -> Tensor:
        """Return the probability of 1 of every unit."""
        return t_NZ.float().sigmoid()


class Categorical(_Natural):
    """One latent, 1 of Z, with logits a: `log Z(a, b) = LSE(a + b) - LSE(a) - LSE(b)`."""

    name = "categorical"

    def overlap(self, a_NZ: Tensor, b_CZ: Tensor) -> Tensor:
        """Return `log sum_z p_a(z) p_b(z)`; takes memory for all N x C x Z."""
        log_a_NZ, log_b_CZ = a_NZ.float().log_softmax(-1), b_CZ.float().log_softmax(-1)
        return (log_a_NZ.unsqueeze(1) + log_b_CZ).logsumexp(-1)

    def surprise(self, a_NZ: Tensor, values: Tensor, label_smoothing: float) -> Tensor:
        """Return the cross-entropy of the observed class."""
        return F.cross_entropy(a_NZ.float(), values, reduction="none", label_smoothing=label_smoothing)

    def log_partition(self, t_NZ: Tensor) -> Tensor:
        """Return `LSE(t)`."""
        return t_NZ.float().logsumexp(-1)

    def mean(self, t_NZ: Tensor) -> Tensor:
        """Return the probability of every class."""
        return t_NZ.float().softmax(-1)


class Vmf(_Natural):
    """One latent on the unit sphere of Z dimensions, von Mises-Fisher: t points at its mode, |t| is how sure it is.

    `log Z(a, b) = A(|a + b|) - A(|a|) - A(|b|)` with densities against the uniform distribution on the sphere, so that
    `A(0) = 0`. A message needs a length of about Z before it tells directions apart sharply.
    """

    name = "vmf"

    def overlap(self, a_NZ: Tensor, b_CZ: Tensor) -> Tensor:
        """Return the overlap in memory for N x C, with `|a + b|^2` from the inner product."""
        a_square_N1, b_square_C = a_NZ.float().square().sum(-1, keepdim=True), b_CZ.float().square().sum(-1)
        square_NC = ((a_NZ @ b_CZ.T).float() * 2 + a_square_N1 + b_square_C).clamp(min=0)
        units = a_NZ.shape[-1]
        apart_NC = log_partition_of_square(a_square_N1, units) + log_partition_of_square(b_square_C, units)
        return log_partition_of_square(square_NC, units) - apart_NC

    def surprise(self, a_NZ: Tensor, values: Tensor, label_smoothing: float) -> Tensor:
        """Return `A(|a|) - <a, y>`, y being the direction of the observed values."""
        directions_NZ = F.normalize(values.float(), dim=-1)
        return self.log_partition(a_NZ) - (a_NZ.float() * directions_NZ).sum(-1)

    def log_partition(self, t_NZ: Tensor) -> Tensor:
        """Return `log I_v(k) - v log k` with `v = Z/2 - 1` and `k = |t|`, less its limit at 0."""
        return log_partition_of_square(t_NZ.float().square().sum(-1), t_NZ.shape[-1])

    def mean(self, t_NZ: Tensor) -> Tensor:
        """Return the mean vector, inside the sphere: `t / |t|` times the ratio of `I_(v+1)` to `I_v` at `|t|`."""
        t_NZ = t_NZ.float()
        return t_NZ * mean_over_parameter(t_NZ.square().sum(-1, keepdim=True), t_NZ.shape[-1])


FAMILIES: dict[str, Family] = {family.name: family for family in (Gaussian(), Bernoulli(), Categorical(), Vmf())}


def get_family(name: str) -> Family:
    """Return the family of that name.

    Raises:
        ConfigError: If there is none.
    """
    if name not in FAMILIES:
        raise ConfigError(f"family={name!r} is not known. Choose one of {sorted(FAMILIES)}.")
    return FAMILIES[name]
