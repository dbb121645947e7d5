"""The activations equal their formulas in float64, and never give NaN gradients."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mm1_mlx.models.activation import (
    ACTIVATIONS,
    gelu,
    gelu_tanh,
    quick_gelu,
    sigmoid,
    silu,
)

POINTS = np.concatenate([np.linspace(-100, 100, 4001), np.linspace(-3, 3, 1001)])


def exact_sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.fixture(autouse=True, params=[0, 1 << 30], ids=["many", "few"])
def many(request, monkeypatch):
    """Both ways of computing on a CPU, whatever the number of values."""
    monkeypatch.setattr("mm1_mlx.models.activation.MANY", request.param)


EXACT = {
    sigmoid: exact_sigmoid,
    silu: lambda x: x * exact_sigmoid(x),
    quick_gelu: lambda x: x * exact_sigmoid(1.702 * x),
}
activations = pytest.mark.parametrize("activation", EXACT, ids=lambda f: f.__name__)


@activations
def test_activation_equals_its_formula_in_float64(activation, tolerances):
    x = POINTS.astype(np.float32)
    expected = EXACT[activation](x.astype(np.float64))
    result = np.array(activation(mx.array(x)))
    # Below sigmoid(-80) = 2e-35 the result is clamped, not followed into denormals.
    np.testing.assert_allclose(result, expected, rtol=tolerances["op"], atol=4e-33)


@activations
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_activation_keeps_half_precision(activation, dtype, tolerances):
    x = mx.array(POINTS.astype(np.float32)).astype(dtype)
    exact = np.array(x.astype(mx.float32)).astype(np.float64)
    result = activation(x)
    assert result.dtype == dtype
    tolerance = tolerances[str(dtype).removeprefix("mlx.core.")]
    np.testing.assert_allclose(
        np.array(result.astype(mx.float32)),
        EXACT[activation](exact),
        rtol=tolerance,
        atol=tolerance,
    )


# In float16 the tanh form's x ** 3 is mlx's own, and overflows past 40.
FINITE = [(name, mx.float32) for name in ACTIVATIONS] + [
    (name, dtype)
    for name in ("quick_gelu", "silu", "gelu")
    for dtype in (mx.float16, mx.bfloat16)
]


@pytest.mark.parametrize(("name", "dtype"), FINITE)
def test_values_and_gradients_are_finite(name, dtype):
    points = np.concatenate([np.linspace(-1e4, 1e4, 2001), POINTS])
    x = mx.array(points.astype(np.float32)).astype(dtype)
    gradient = mx.grad(lambda x: ACTIVATIONS[name](x).sum())(x)
    assert mx.isfinite(ACTIVATIONS[name](x)).all()
    assert mx.isfinite(gradient).all()


GRADIENTS = EXACT | {
    gelu: lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x * 0.5**0.5)),
    gelu_tanh: lambda x: (
        x * 0.5 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
    ),
}


@pytest.mark.parametrize("block", [700, 1 << 18])
@pytest.mark.parametrize("activation", GRADIENTS, ids=lambda f: f.__name__)
def test_gradients_equal_the_formula_in_float64(
    activation, block, tolerances, monkeypatch
):
    monkeypatch.setattr("mm1_mlx.kernels.by_blocks.BLOCK", block)
    x, step = POINTS, 1e-5
    formula = GRADIENTS[activation]
    exact = (formula(x + step) - formula(x - step)) / (2 * step)
    gradient = mx.grad(lambda x: activation(x).sum())(mx.array(x.astype(np.float32)))
    np.testing.assert_allclose(
        np.array(gradient), exact, rtol=tolerances["model"], atol=tolerances["op"]
    )
