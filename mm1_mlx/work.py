"""How many operations a model does, from its config alone: those of its matrix products.

A product of [n, a] and [a, b] counts 2 n a b. What is a matter of arithmetic is counted,
not what a backend does: of causal attention the half that is not hidden. Norms,
activations and biases are left out; they are less than a hundredth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from mm1_mlx.config import (
    AttentionPoolConfig,
    AveragePoolConfig,
    CAbstractorConfig,
    DecoderConfig,
    LinearConfig,
    MLPConfig,
    MM1Config,
    PerceiverConfig,
    VisionConfig,
)


def encode_flops(config: MM1Config, tiles: int = 1, size: int | None = None) -> int:
    """Operations from tiles to image tokens.

    Args:
        config: the model's.
        tiles: how many.
        size: of a tile's side, in pixels; by default what the model's pictures have.
    """
    vision, connector = config.vision, config.connector
    if vision is None:
        return 0
    size = size or (config.image.size if config.image else vision.image_size)
    flops = vision_flops(vision, size)
    if connector is not None:
        patches = (size // vision.patch_size) ** 2
        flops += connector_flops(connector, patches + (not vision.drop_cls))
    return tiles * flops


def vision_flops(config: VisionConfig, size: int) -> int:
    """Operations of the encoder for one tile of ``size`` pixels a side."""
    D, H = config.hidden_size, config.intermediate_size
    patches = (size // config.patch_size) ** 2
    L = patches + config.class_token
    total = 2 * patches * config.patch_size**2 * 3 * D
    for layer in range(config.depth):
        attention = 4 * D * D + 2 * L * D
        mlp, route = (3 if config.gated_mlp else 2) * D * H, 0
        if config.moe and config.is_sparse(layer):
            mlp *= config.moe.experts_per_image
            # Once per image.
            route = D * config.moe.num_experts
        total += 2 * L * (attention + mlp) + 2 * route
    return total


def connector_flops(config: Any, features: int) -> int:
    """Operations of the connector for one tile of so many features."""
    return 2 * _CONNECTORS[type(config)](config, features)


def _linear(config: LinearConfig, L: int) -> int:
    return L * config.input_size * config.output_size


def _mlp(config: MLPConfig, L: int) -> int:
    D = config.output_size
    pooling = _resample(L, config.pooled_tokens or 0) * D
    return L * config.hidden_size * (config.input_size + D) + pooling


def _average_pool(config: AveragePoolConfig, L: int) -> int:
    C, K = config.input_size, config.num_image_tokens
    return _resample(L, K) * C + K * C * config.output_size


def _attention_pool(config: AttentionPoolConfig, L: int) -> int:
    C, D, K = config.input_size, config.output_size, config.num_image_tokens
    # Queries are the same for all tiles of a call; counted with each, they are few.
    return K * D * D + 2 * L * C * D + 2 * K * L * D + K * D * D


def _perceiver(config: PerceiverConfig, L: int) -> int:
    C, K = config.input_size, config.num_image_tokens
    inner = config.num_attention_heads * config.head_dim
    attention = 2 * K * C * inner + 2 * (L + K) * C * inner + 2 * K * (L + K) * inner
    layer = attention + 2 * K * C * config.intermediate_size
    return config.depth * layer + K * C * config.output_size


def _c_abstractor(config: CAbstractorConfig, L: int) -> int:
    hidden, D = config.hidden_size, config.output_size
    K = config.num_image_tokens - config.num_eos_tokens
    widths = [config.input_size, *[hidden] * config.depth]
    first = sum(_bottleneck(a, b, L) for a, b in pairwise(widths))
    second = config.depth * _bottleneck(hidden, hidden, K)
    readout = [hidden, *[D] * config.mlp_depth]
    pooling = _resample(L, K) * widths[-1]
    return first + pooling + second + K * sum(a * b for a, b in pairwise(readout))


def _bottleneck(a: int, b: int, places: int) -> int:
    shortcut = a * b if a != b else 0
    gate = 2 * b * round(a * 0.25)
    return places * (a * b + 9 * b + b * b + shortcut) + gate


def _resample(L: int, K: int) -> int:
    """Products of one channel, pooled along one side of its square and then the other."""
    g, s = math.isqrt(L), math.isqrt(K)
    return s * g * g + s * s * g


_CONNECTORS: dict[type, Callable[[Any, int], int]] = {
    LinearConfig: _linear,
    MLPConfig: _mlp,
    AveragePoolConfig: _average_pool,
    AttentionPoolConfig: _attention_pool,
    PerceiverConfig: _perceiver,
    CAbstractorConfig: _c_abstractor,
}


def decoder_flops(
    config: DecoderConfig, positions: int, before: int = 0, rows: int = 1
) -> int:
    """Operations of the decoder over some positions.

    Args:
        config: the decoder's.
        positions: how many are run.
        before: how many the cache holds.
        rows: of how many, the last ones, the logits are wanted. The last layer computes
            for the others their keys and values alone, but where experts have a
            capacity: for it all compete.
    """
    D = config.hidden_size
    capacity = bool(config.moe and config.moe.capacity_factor)
    total = rows * D * config.vocab_size
    for layer in range(config.num_hidden_layers):
        last = layer == config.num_hidden_layers - 1
        asked = rows if last and not capacity else positions
        keys = _keys(asked, before + positions - asked, config.sliding_window)
        sizes = config.sizes(layer)
        q = sizes.num_attention_heads * config.head_dim
        kv = sizes.num_key_value_heads * config.head_dim
        mlp = 3 * D * sizes.intermediate_size
        if config.moe and config.is_sparse(layer):
            mlp = mlp * config.moe.experts_per_token + D * config.moe.num_experts
        total += asked * (2 * D * q + mlp) + positions * 2 * D * kv + 2 * keys * q
    return 2 * total


def _keys(positions: int, before: int, window: int | None) -> int:
    """Keys that the positions look at, all together."""
    if window is None:
        return positions * before + positions * (positions + 1) // 2
    return sum(min(before + i + 1, window) for i in range(positions))
