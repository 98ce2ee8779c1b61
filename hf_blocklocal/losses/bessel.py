"""The log-partition function of directions on a sphere, in float32 and for any dimension and concentration.

`log E[exp(<t, z>)]` over z uniform on the unit sphere of d dimensions is `log I_v(k) - v log k` with `v = d/2 - 1` and
`k = |t|`, shifted to be 0 at 0. Both it and its slope are smooth in `x = k^2`, so that is the argument here.

Orders of at least `LARGE` use the uniform asymptotic expansion (DLMF 10.41) of the logarithm. Lower orders come down
from there by `I_j = (2 (j + 1) / k) I_(j+1) + I_(j+2)`: going down adds positive numbers only, so nothing cancels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


LARGE = 16.0
# Term j = 1, 2, ... of the logarithm of the expansion is s^-j times a polynomial in p^2, lowest power first.
_TERMS = (
    (1 / 8, -5 / 24),
    (1 / 16, -3 / 8, 5 / 16),
    (25 / 384, -531 / 640, 221 / 128, -1105 / 1152),
    (13 / 128, -71 / 32, 531 / 64, -339 / 32, 565 / 128),
)
# Below this share of the order, x is small enough for two terms of the power series.
_SMALL = 0.01


def log_partition_of_square(x: Tensor, dimension: int) -> Tensor:
    """Return `log E[exp(<t, z>)]` over the unit sphere, given `x = |t|^2`.

    Args:
        x: Squared concentrations, not negative, of any shape.
        dimension: Dimension of the space that the sphere lies in, at least 1.
    """
    return _LogPartition.apply(x, dimension)


def mean_over_parameter(x: Tensor, dimension: int) -> Tensor:
    """Return `I_(v+1)(k) / (k I_v(k))`, the factor that turns `t` into the mean of z, given `x = |t|^2`."""
    return _evaluate(x, dimension / 2 - 1)[1]


class _LogPartition(torch.autograd.Function):
    """Keep for backward only the slope, which is half the ratio of two Bessel functions over the concentration."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dimension: int) -> Tensor:
        value, ratio = _evaluate(x, dimension / 2 - 1)
        ctx.save_for_backward(ratio)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (ratio,) = ctx.saved_tensors
        return gradient * ratio / 2, None


def _evaluate(x: Tensor, order: float) -> tuple[Tensor, Tensor]:
    """Return the log-partition function of an order, and the ratio `I_(order+1) / (k I_order)`."""
    steps = max(0, math.ceil(LARGE - order))
    value, ratio = _expand(x, order + steps)
    for step in range(1, steps + 1):
        twice = 2 * (order + steps - step + 1)
        product = x * ratio / twice
        value = value + product.log1p()
        ratio = 1 / (twice * (1 + product))
    return value, ratio


def _expand(x: Tensor, order: float) -> tuple[Tensor, Tensor]:
    """Return the same for a large order."""
    s = (order**2 + x).sqrt()
    excess = x / (s + order)  # s - order
    correction, slope = _corrections(s, order)
    at_zero, _ = _corrections(order, order)
    value = excess - order * (excess / (2 * order)).log1p() - (excess / order).log1p() / 2 + (correction - at_zero)
    share = x / (4 * (order + 1))
    series = share * (1 - share / (2 * (order + 2)))
    ratio = 1 / (order + s) - (0.5 + slope) / s**2
    return torch.where(x < _SMALL * order, series, value), ratio


def _corrections(s: Any, order: float) -> tuple[Any, Any]:
    """Return the sum of the terms, and minus its derivative with respect to log s."""
    p_squared = (order / s) ** 2
    total, slope = 0.0, 0.0
    for degree in range(len(_TERMS), 0, -1):
        value, derivative = 0.0, 0.0
        for power in range(degree, -1, -1):
            coefficient = _TERMS[degree - 1][power]
            value = value * p_squared + coefficient
            derivative = derivative * p_squared + (degree + 2 * power) * coefficient
        total, slope = (total + value) / s, (slope + derivative) / s
    return total, slope
