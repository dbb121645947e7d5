"""The activation functions a config may name."""

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x)).

    mlx's CPU backend computes a power of two three times as fast as an exponential.
    """
    if mx.default_device() == mx.cpu and x.dtype == mx.float32:
        # Below -80 the power overflows and its gradient is not a number.
        return 1 / (1 + mx.power(2.0, -math.log2(math.e) * mx.maximum(x, -80.0)))
    return mx.sigmoid(x)


def silu(x: mx.array) -> mx.array:
    """X * sigmoid(x)."""
    return x * sigmoid(x)


def quick_gelu(x: mx.array) -> mx.array:
    """X * sigmoid(1.702 x), OpenAI CLIP's activation."""
    return x * sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "gelu_tanh": nn.gelu_approx,
    "quick_gelu": quick_gelu,
    "silu": silu,
}
