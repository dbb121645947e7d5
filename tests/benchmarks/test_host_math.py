"""Exponentials by numpy are those by mlx's operations, and so are their gradients."""

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.shapes.host_math import use_host_math
from mm1_mlx.kernels import blocked, exponential
from mm1_mlx.models import activation


@pytest.fixture
def host_math(monkeypatch):
    monkeypatch.setattr(exponential, "_exp2", exponential._exp2)
    monkeypatch.setattr(activation, "_sigmoid", activation._sigmoid)
    monkeypatch.setattr(activation, "MANY", 0)

    def use():
        use_host_math()

    return use


def found():
    mx.random.seed(0)
    x = 3 * mx.random.normal((2, 3, 40, 16))

    def loss(x):
        seen = blocked.attend(x, x, 0.1 * x, scale=0.25, mask="causal")
        return (activation.quick_gelu(seen) * x).sum() + activation.silu(x).sum()

    value, gradient = mx.value_and_grad(loss)(x)
    return value.item(), np.array(gradient)


def test_values_and_gradients_are_the_same(host_math):
    before = exponential._exp2, activation._sigmoid
    value, gradient = found()
    host_math()
    assert exponential._exp2 is not before[0]
    assert activation._sigmoid is not before[1]
    ours, its = found()
    assert ours == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(its, gradient, rtol=1e-4, atol=1e-5)
