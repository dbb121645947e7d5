"""The activation functions a config may name."""

import math
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.kernels.by_blocks import by_blocks
from mm1_mlx.kernels.exponential import LOG2_E, erf, exp2
from mm1_mlx.kernels.tracing import on_cpu

# Values from which on several operations on each cost less than one exponential: more
# than those of a token that is decoded.
MANY = 1 << 14


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x))."""
    return cast(mx.array, _sigmoid(x)) if _on_cpu(x) else mx.sigmoid(x)


def gelu(x: mx.array) -> mx.array:
    """X times the normal distribution's probability below x."""
    return cast(mx.array, _gelu(x)) if _on_cpu(x) else nn.gelu(x)


def gelu_tanh(x: mx.array) -> mx.array:
    """``gelu`` with that probability approximated by a hyperbolic tangent."""
    return cast(mx.array, _gelu_tanh(x)) if _on_cpu(x) else nn.gelu_approx(x)


def silu(x: mx.array) -> mx.array:
    """X * sigmoid(x)."""
    return x * sigmoid(x)


def quick_gelu(x: mx.array) -> mx.array:
    """X * sigmoid(1.702 x), OpenAI CLIP's activation."""
    return x * sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "silu": silu,
}


def _on_cpu(x: mx.array) -> bool:
    """Whether mlx would compute one exponential at a time, and many of them."""
    return on_cpu() and x.dtype == mx.float32 and x.size >= MANY


def _blocked(function: Callable[[mx.array], mx.array]) -> Any:
    """A function by blocks whose derivative goes by blocks too.

    The one that mlx finds would write every block's into an array as large as all.
    """

    def derivative(x: mx.array, cotangent: mx.array) -> mx.array:
        return mx.vjp(function, [x], [cotangent])[1][0]

    whole = mx.custom_function(lambda x: by_blocks(function, x))
    whole.vjp(lambda x, cotangent, _: by_blocks(derivative, x, cotangent))
    return whole


# Below, the power would leave float32.
_sigmoid = _blocked(lambda x: 1 / (exp2(mx.maximum(x, -80.0) * -LOG2_E) + 1))
# Its derivative is known from its value.
_sigmoid.vjp(lambda _, cotangent, output: cotangent * (output * (1 - output)))
_gelu = _blocked(lambda x: x * (erf(x * 0.5**0.5) + 1) * 0.5)
# (1 + tanh(y)) / 2 is the sigmoid of 2y.
_gelu_tanh = _blocked(
    lambda x: x * sigmoid((8 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x))
)
