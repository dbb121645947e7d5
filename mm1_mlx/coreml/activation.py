"""The activation functions of ``models.activation`` as Core ML has them."""

from __future__ import annotations

from typing import Any

from mm1_mlx.coreml.tools import mb

ACTIVATIONS: dict[str, Any] = {
    "gelu": lambda x: mb.gelu(x=x, mode="EXACT"),
    "gelu_tanh": lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
    "quick_gelu": lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
    "silu": lambda x: mb.silu(x=x),
}
