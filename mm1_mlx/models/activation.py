"""The activation functions a config may name."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "gelu_tanh": nn.gelu_approx,
    # OpenAI's CLIP: x * sigmoid(1.702 x).
    "quick_gelu": nn.gelu_fast_approx,
    "silu": nn.silu,
}
