"""The log-partition function of the sphere is what integration and a library of special functions say, in float32."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import gammaln, ive

from hf_blocklocal.losses.bessel import log_partition_of_square, mean_over_parameter


DIMENSIONS = [2, 3, 4, 5, 16, 33, 34, 35, 128, 512, 1000]
CONCENTRATIONS = [0.0, 1e-3, 0.03, 0.4, 0.5, 1.0, 3.0, 10.0, 50.0, 300.0, 1e3, 1e4]


def value_and_slope(dimension, concentrations):
    """Return the function and its derivative with respect to the concentration, found in float32."""
    k = torch.tensor(concentrations, dtype=torch.float32, requires_grad=True)
    value = log_partition_of_square(k.square(), dimension)
    (slope,) = torch.autograd.grad(value.sum(), k)
    assert value.dtype == slope.dtype == torch.float32
    return value.detach().double().numpy(), slope.double().numpy()


def integrated(dimension, k):
    """Integrate `exp(k cos)` and `cos exp(k cos)` over the angle to the message, in float64."""
    angles = np.linspace(0, math.pi, 400_001)
    cosines = np.cos(angles)
    log_measure = np.zeros_like(angles)
    if dimension > 2:
        with np.errstate(divide="ignore"):
            log_measure = (dimension - 2) * np.log(np.sin(angles))
    exponent = k * (cosines - 1) + log_measure
    weights = np.exp(exponent - exponent.max())
    total = np.trapezoid(weights, angles)
    log_value = k + exponent.max() + math.log(total) - math.log(np.trapezoid(np.exp(log_measure), angles))
    return log_value, np.trapezoid(cosines * weights, angles) / total


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_value_and_gradient_are_the_integrals_over_the_sphere(dimension):
    value, slope = value_and_slope(dimension, CONCENTRATIONS)
    expected = np.array([integrated(dimension, k) for k in CONCENTRATIONS])
    np.testing.assert_allclose(value, expected[:, 0], rtol=3e-6, atol=1e-9)
    np.testing.assert_allclose(slope, expected[:, 1], rtol=3e-6, atol=1e-9)


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_value_and_gradient_are_those_of_the_bessel_functions_wherever_these_do_not_underflow(dimension):
    order, k = dimension / 2 - 1, np.array([k for k in CONCENTRATIONS if k > 0])
    scaled = ive(order, k)
    there = scaled > 1e-280
    assert there.sum() >= 3
    k, scaled = k[there], scaled[there]
    expected = np.log(scaled) + k - order * np.log(k / 2) + gammaln(order + 1)
    value, slope = value_and_slope(dimension, k)
    # Near 0 the reference itself is a difference of large numbers.
    np.testing.assert_allclose(value, expected, rtol=3e-6, atol=1e-9 + 1e-12 * gammaln(order + 2))
    np.testing.assert_allclose(slope, ive(order + 1, k) / scaled, rtol=3e-6)


def test_on_the_sphere_of_two_points_it_is_the_logarithm_of_the_hyperbolic_cosine():
    k = torch.linspace(0, 20, 101, dtype=torch.float64)
    torch.testing.assert_close(log_partition_of_square(k.square(), 1), k.cosh().log(), rtol=1e-6, atol=1e-7)


def test_on_the_ordinary_sphere_it_is_the_logarithm_of_a_hyperbolic_sine():
    k = torch.linspace(0.1, 20, 101, dtype=torch.float64)
    torch.testing.assert_close(log_partition_of_square(k.square(), 3), (k.sinh() / k).log(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dimension", [2, 3, 128])
def test_the_gradient_at_a_message_of_zero_is_zero_and_finite(dimension):
    t = torch.zeros(dimension, requires_grad=True)
    value = log_partition_of_square(t.square().sum(), dimension)
    (gradient,) = torch.autograd.grad(value, t)
    assert value == 0
    assert torch.equal(gradient, torch.zeros(dimension))


@pytest.mark.parametrize("dimension", [2, 34, 128])
def test_the_factor_of_the_mean_is_twice_the_slope_and_has_a_gradient_of_its_own(dimension):
    x = torch.tensor([0.0, 0.1, 4.0, 1e3, 1e6], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(log_partition_of_square(x, dimension).sum(), x)
    torch.testing.assert_close(mean_over_parameter(x, dimension), 2 * slope)
    assert torch.autograd.gradcheck(lambda x: mean_over_parameter(x, dimension), x[:4].detach().requires_grad_())
