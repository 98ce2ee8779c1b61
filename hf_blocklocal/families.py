"""The exponential families of the messages between input and target.

A family says how well two messages agree: the logarithm of the overlap of the forward message `alpha` (natural
parameters a) and the backward message `beta` (natural parameters b), summed over the units of the latent, and what
remains of it when beta is a point mass at an observed target. Formulas: Kappel et al. 2023 (arXiv 2305.14974) read as
in the README; constants that neither message can change are left out.
"""

# Shapes: N targets, C candidates, Z units of the latent.

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from hf_blocklocal.errors import ConfigError


class Family(Protocol):
    """What a loss needs to know of an exponential family."""

    name: str

    def overlap(self, a_NZ: Tensor, b_CZ: Tensor) -> Tensor:
        """Return `log Z(a_n, b_c)` for every pair, (N, C), up to a term that depends on a alone."""

    def surprise(self, a_NZ: Tensor, values: Tensor, label_smoothing: float) -> Tensor:
        """Return the agreement loss, (N,), when beta is a point mass at the observed values."""


class Gaussian:
    """Unit-variance normal latents: `log Z(a, b) = -(a - b)^2 / 4` per unit."""

    name = "gaussian"

    def overlap(self, a_NZ: Tensor, b_CZ: Tensor) -> Tensor:
        """Return `a b / 2 - b^2 / 4` summed over units: the overlap without `a^2 / 4`."""
        return (a_NZ / 2 @ b_CZ.T).float() - b_CZ.float().square().sum(-1) / 4

    def surprise(self, a_NZ: Tensor, values: Tensor, label_smoothing: float) -> Tensor:
        """Return `(a - y)^2 / 4` summed over units."""
        return (a_NZ.float() - values.float()).square().sum(-1) / 4


class Bernoulli:
    """Binary latents with logits a: `log Z(a, b) = softplus(a + b) - softplus(a) - softplus(b)` per unit."""

    name = "bernoulli"

    def overlap(self, a_NZ: Tensor, b_CZ: Tensor) -> Tensor:
        """Return the overlap summed over units; takes memory for all N x C x Z."""
        a_N1Z, b_CZ = a_NZ.float().unsqueeze(1), b_CZ.float()
        return (F.softplus(a_N1Z + b_CZ) - F.softplus(a_N1Z) - F.softplus(b_CZ)).sum(-1)

    def surprise(self, a_NZ: Tensor, values: Tensor, label_smoothing: float) -> Tensor:
        """Return the binary cross-entropy of the labels, summed over units."""
        return F.binary_cross_entropy_with_logits(a_NZ.float(), values.float(), reduction="none").sum(-1)


class Categorical:
    """One latent, 1 of Z, with logits a: `log Z(a, b) = LSE(a + b) - LSE(a) - LSE(b)`."""

    name = "categorical"

    def overlap(self, a_NZ: Tensor, b_CZ: Tensor) -> Tensor:
        """Return `log sum_z p_a(z) p_b(z)`; takes memory for all N x C x Z."""
        log_a_NZ, log_b_CZ = a_NZ.float().log_softmax(-1), b_CZ.float().log_softmax(-1)
        return (log_a_NZ.unsqueeze(1) + log_b_CZ).logsumexp(-1)

    def surprise(self, a_NZ: Tensor, values: Tensor, label_smoothing: float) -> Tensor:
        """Return the cross-entropy of the observed class."""
        return F.cross_entropy(a_NZ.float(), values, reduction="none", label_smoothing=label_smoothing)


FAMILIES: dict[str, Family] = {family.name: family for family in (Gaussian(), Bernoulli(), Categorical())}


def get_family(name: str) -> Family:
    """Return the family of that name.

    Raises:
        ConfigError: If there is none.
    """
    if name not in FAMILIES:
        raise ConfigError(f"family={name!r} is not known. Choose one of {sorted(FAMILIES)}.")
    return FAMILIES[name]
