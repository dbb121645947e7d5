"""Vision-language connectors: patch features [N, L, C] to image tokens [N, K, D].

MM1 (arXiv 2403.09611), section 3.2. Pooling connectors read the features as a square
grid in raster order.
"""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.config import AveragePoolConfig, ConnectorConfig, LinearConfig, MLPConfig
from mm1_mlx.models.activation import ACTIVATIONS
from mm1_mlx.models.c_abstractor import CAbstractor
from mm1_mlx.models.resample import pooling_matrix, resample
from mm1_mlx.models.resampler import AttentionPool, Perceiver


class LinearConnector(nn.Module):
    """Every feature through one linear layer."""

    def __init__(self, config: LinearConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.input_size, config.output_size, config.bias)

    def __call__(self, features: mx.array) -> mx.array:
        return self.linear(features)


class MLPConnector(nn.Module):
    """Every feature through two linear layers, then averaged where the config says so.

    Source: LLaVA-1.5 (arXiv 2310.03744), ``mlp2x_gelu``; Matryoshka Multimodal Models
    (arXiv 2405.17430) for the averages.
    """

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.linear_1 = nn.Linear(config.input_size, config.hidden_size, config.bias)
        self.linear_2 = nn.Linear(config.hidden_size, config.output_size, config.bias)
        self.pooled_tokens = config.pooled_tokens

    def __call__(self, features: mx.array) -> mx.array:
        x = self.linear_2(self.activation(self.linear_1(features)))
        return average_pool(x, self.pooled_tokens) if self.pooled_tokens else x


def average_pool(x: mx.array, num_bins: int) -> mx.array:
    """Means [N, num_bins, C] of square bins of a square grid [N, g * g, C]."""
    N, L, C = x.shape
    g, s = math.isqrt(L), math.isqrt(num_bins)
    x = resample(x.reshape(N, g, g, C), pooling_matrix(g, s))
    return x.reshape(N, -1, C)


class AveragePoolConnector(nn.Module):
    """Square bins of the patch grid, averaged, through one linear layer."""

    def __init__(self, config: AveragePoolConfig) -> None:
        super().__init__()
        self.num_image_tokens = config.num_image_tokens
        self.linear = nn.Linear(config.input_size, config.output_size, config.bias)

    def __call__(self, features: mx.array) -> mx.array:
        return self.linear(average_pool(features, self.num_image_tokens))


CONNECTORS: dict[str, Any] = {
    "linear": LinearConnector,
    "mlp": MLPConnector,
    "average_pool": AveragePoolConnector,
    "attention_pool": AttentionPool,
    "perceiver": Perceiver,
    "c_abstractor": CAbstractor,
}


def build_connector(config: ConnectorConfig) -> nn.Module:
    """The connector of a config, with the token [D] that ends a tiled picture's rows."""
    connector = CONNECTORS[config.kind](config)
    if config.newline:
        connector.newline = mx.random.normal((config.output_size,), scale=0.02)
    return connector
