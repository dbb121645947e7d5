"""The connectors in a layout's operations: patch features to image tokens.

The counterparts of ``models.connector``, for one picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from mm1_mlx.config import (
    AttentionPoolConfig,
    AveragePoolConfig,
    CAbstractorConfig,
    MLPConfig,
    PerceiverConfig,
)
from mm1_mlx.coreml.activation import ACTIVATIONS
from mm1_mlx.coreml.layout import Layout, Value, spell
from mm1_mlx.coreml.tools import mb
from mm1_mlx.coreml.weights import Array, Weights
from mm1_mlx.models.resample import pooling_matrix, stretch


class Writer:
    """Writes a connector's layers; paths are those behind ``connector.``."""

    def __init__(self, layout: Layout, weights: Weights) -> None:
        self.layout = layout
        self.weights = weights

    def weight(self, path: str) -> Array:
        """A tensor of the connector."""
        return self.weights(f"connector.{path}")

    def has(self, path: str) -> bool:
        """Whether the connector has such a tensor."""
        return f"connector.{path}" in self.weights

    def linear(self, x: Value, path: str) -> Value:
        """States after a linear layer."""
        bias = self.weight(f"{path}.bias") if self.has(f"{path}.bias") else None
        name = spell(f"connector.{path}")
        return self.layout.linear(x, self.weight(f"{path}.weight"), bias, name)

    def norm(self, x: Value, path: str, eps: float) -> Value:
        """States after a layer norm."""
        weight, bias = self.weight(f"{path}.weight"), self.weight(f"{path}.bias")
        return self.layout.layer_norm(x, weight, bias, eps, spell(f"connector.{path}"))

    def pool(self, x: Value, features: int, bins: int, name: str) -> Value:
        """The means of square bins of a square grid."""
        matrix = np.array(pooling_matrix(math.isqrt(features), math.isqrt(bins)))
        return self.layout.resample(x, matrix, spell(f"connector.{name}"))


def _linear(writer: Writer, x: Value, config: Any, features: int) -> Value:  # noqa: ARG001
    return writer.linear(x, "linear")


def _mlp(writer: Writer, x: Value, config: MLPConfig, features: int) -> Value:
    x = ACTIVATIONS[config.hidden_act](writer.linear(x, "linear_1"))
    x = writer.linear(x, "linear_2")
    pooled = config.pooled_tokens
    return writer.pool(x, features, pooled, "pooled") if pooled else x


def _average_pool(
    writer: Writer, x: Value, config: AveragePoolConfig, features: int
) -> Value:
    x = writer.pool(x, features, config.num_image_tokens, "pooled")
    return writer.linear(x, "linear")


def _attention_pool(
    writer: Writer,
    x: Value,
    config: AttentionPoolConfig,
    features: int,  # noqa: ARG001
) -> Value:
    eps, heads = config.layer_norm_eps, config.num_attention_heads
    x = writer.norm(x, "feature_norm", eps)
    k, v = writer.linear(x, "k_proj"), writer.linear(x, "v_proj")
    q = _as_value(writer, _pool_queries(writer, eps))
    x = writer.layout.attend(q, k, v, heads, "connector_heads")
    return writer.norm(writer.linear(x, "out_proj"), "norm", eps)


def _pool_queries(writer: Writer, eps: float) -> Array:
    """The learned queries [K, D] after their norm and projection: no picture in them."""
    query, scale, shift = (
        mx.array(writer.weight(name))
        for name in ("query", "query_norm.weight", "query_norm.bias")
    )
    query = mx.fast.layer_norm(query, scale, shift, eps)
    weight, bias = writer.weight("q_proj.weight"), writer.weight("q_proj.bias")
    return np.array(query) @ weight.T + bias


def _perceiver(
    writer: Writer,
    x: Value,
    config: PerceiverConfig,
    features: int,  # noqa: ARG001
) -> Value:
    eps, heads = config.layer_norm_eps, config.num_attention_heads
    latents = _as_value(writer, writer.weight("latents"))
    for i in range(config.depth):
        path = f"layers.{i}"
        q = writer.norm(latents, f"{path}.latent_norm", eps)
        seen = writer.layout.join([writer.norm(x, f"{path}.feature_norm", eps), q])
        k, v = (writer.linear(seen, f"{path}.{name}_proj") for name in "kv")
        q = writer.linear(q, f"{path}.q_proj")
        y = writer.layout.attend(q, k, v, heads, spell(f"connector.{path}.heads"))
        latents = mb.add(x=latents, y=writer.linear(y, f"{path}.out_proj"))
        y = writer.norm(latents, f"{path}.mlp_norm", eps)
        y = ACTIVATIONS["gelu"](writer.linear(y, f"{path}.fc1"))
        y = writer.linear(y, f"{path}.fc2")
        latents = mb.add(x=latents, y=y, name=spell(f"connector.{path}"))
    return writer.linear(writer.norm(latents, "norm", eps), "projection")


def _c_abstractor(
    writer: Writer, x: Value, config: CAbstractorConfig, features: int
) -> Value:
    if config.prenorm:
        x = writer.norm(x, "prenorm", 1e-6)
    if config.position_embedding:
        table = mx.array(writer.weight("position_embedding"))
        places = stretch(table, math.isqrt(features), "bicubic_antialias")
        rows = writer.layout.rows(np.array(places))
        x = mb.add(x=x, y=rows, name="connector_positions")
    for i in range(config.depth):
        x = _bottleneck(writer, x, f"stage1.{i}", config.layer_norm_eps)
    pooled = config.num_image_tokens - config.num_eos_tokens
    x = writer.pool(x, features, pooled, "pooled")
    for i in range(config.depth):
        x = _bottleneck(writer, x, f"stage2.{i}", config.layer_norm_eps)
    for i in range(config.mlp_depth):
        x = writer.linear(mb.silu(x=x) if i else x, f"readout.{i}")
    if config.num_eos_tokens:
        ends = writer.layout.rows(writer.weight("eos_tokens"))
        x = writer.layout.join([x, ends])
    return x


def _bottleneck(writer: Writer, x: Value, path: str, eps: float) -> Value:
    """One of the C-Abstractor's blocks; ``models.c_abstractor.Bottleneck``."""
    y = writer.norm(writer.linear(x, f"{path}.conv1"), f"{path}.norm1", eps)
    kernel = writer.weight(f"{path}.conv2.weight").transpose(0, 3, 1, 2)
    name = spell(f"connector.{path}.conv2")
    y = writer.layout.depthwise(mb.silu(x=y), kernel, name)
    y = mb.silu(x=writer.norm(y, f"{path}.norm2", eps))
    gate = writer.layout.mean(y, spell(f"connector.{path}.se.means"))
    gate = mb.silu(x=writer.linear(gate, f"{path}.se.fc1"))
    gate = mb.sigmoid(x=writer.linear(gate, f"{path}.se.fc2"))
    y = writer.linear(mb.mul(x=y, y=gate), f"{path}.conv3")
    y = writer.norm(y, f"{path}.norm3", eps)
    if writer.has(f"{path}.shortcut.conv.weight"):
        x = writer.linear(x, f"{path}.shortcut.conv")
        x = writer.norm(x, f"{path}.shortcut.norm", eps)
    return mb.silu(x=mb.add(x=y, y=x), name=spell(f"connector.{path}"))


def _as_value(writer: Writer, table: Array) -> Value:
    return mb.const(val=writer.layout.rows(table))


# As ``models.connector.CONNECTORS``.
CONNECTORS: dict[str, Callable[..., Value]] = {
    "linear": _linear,
    "mlp": _mlp,
    "average_pool": _average_pool,
    "attention_pool": _attention_pool,
    "perceiver": _perceiver,
    "c_abstractor": _c_abstractor,
}


def connect(layout: Layout, weights: Weights, x: Value, features: int) -> Value:
    """Image tokens of so many patch features."""
    config = weights.config.connector
    assert config is not None
    return CONNECTORS[config.kind](Writer(layout, weights), x, config, features)
