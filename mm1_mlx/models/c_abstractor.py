"""The C-Abstractor: a connector that keeps the picture's layout.

Honeybee (arXiv 2312.06742), the connector that MM1 chose (arXiv 2403.09611, section 3.2).
"""

import math
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.config import CAbstractorConfig
from mm1_mlx.models.activation import sigmoid, silu
from mm1_mlx.models.resample import pooling_matrix, resample, stretch


class DepthwiseConv(nn.Module):
    """A 3 x 3 convolution of each channel of [N, H, W, C] by itself, zero-padded."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = mx.random.normal((channels, 3, 3, 1), scale=1 / 3)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.conv2d(x, self.weight, padding=1, groups=x.shape[-1])


class SqueezeExcite(nn.Module):
    """Channels of [N, H, W, C] scaled by a gate computed from their means."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def __call__(self, x: mx.array) -> mx.array:
        means = x.mean(axis=(1, 2), keepdims=True)
        return x * sigmoid(self.fc2(silu(self.fc1(means))))


class Shortcut(nn.Module):
    """A normalised projection for blocks that change the width."""

    def __init__(self, input_size: int, output_size: int, eps: float) -> None:
        super().__init__()
        self.conv = nn.Linear(input_size, output_size, bias=False)
        self.norm = nn.LayerNorm(output_size, eps)

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """A RegNet bottleneck of group size 1 with squeeze-and-excitation.

    1 x 1 convolutions are linear layers over channels, norms are LayerNorms over
    channels. The gate's width is a quarter of the block's input width.

    Source: timm's RegNet ``Bottleneck`` as Honeybee instantiates it.
    """

    def __init__(self, input_size: int, output_size: int, eps: float) -> None:
        super().__init__()
        self.conv1 = nn.Linear(input_size, output_size, bias=False)
        self.norm1 = nn.LayerNorm(output_size, eps)
        self.conv2 = DepthwiseConv(output_size)
        self.norm2 = nn.LayerNorm(output_size, eps)
        self.se = SqueezeExcite(output_size, round(input_size * 0.25))
        self.conv3 = nn.Linear(output_size, output_size, bias=False)
        self.norm3 = nn.LayerNorm(output_size, eps)
        if input_size != output_size:
            self.shortcut = Shortcut(input_size, output_size, eps)

    def __call__(self, x: mx.array) -> mx.array:
        y = silu(self.norm1(self.conv1(x)))
        y = silu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(self.se(y)))
        return silu(y + (self.shortcut(x) if "shortcut" in self else x))


class CAbstractor(nn.Module):
    """Image tokens that keep the picture's layout: convolve, pool, convolve, project.

    Source: Honeybee (arXiv 2312.06742), ``CAbstractor``; MM1's own depth and width are
    not published, so the config's defaults are Honeybee's.
    """

    def __init__(self, config: CAbstractorConfig) -> None:
        super().__init__()
        C, D, eps = config.input_size, config.output_size, config.layer_norm_eps
        hidden = config.hidden_size
        if config.prenorm:
            self.prenorm = nn.LayerNorm(C, 1e-6)
        if config.position_embedding:
            self.position_embedding = mx.random.normal(
                (config.num_features, C), scale=0.02
            )
        self.pooled = config.num_image_tokens - config.num_eos_tokens
        widths = [C, *[hidden] * config.depth]
        self.stage1 = [Bottleneck(a, b, eps) for a, b in pairwise(widths)]
        self.stage2 = [Bottleneck(hidden, hidden, eps) for _ in range(config.depth)]
        widths = [hidden, *[D] * config.mlp_depth]
        self.readout = [nn.Linear(a, b) for a, b in pairwise(widths)]
        if config.num_eos_tokens:
            self.eos_tokens = mx.random.normal((config.num_eos_tokens, D), scale=0.02)

    def __call__(self, features: mx.array) -> mx.array:
        x = self.prenorm(features) if "prenorm" in self else features
        if "position_embedding" in self:
            grid_size = math.isqrt(x.shape[1])
            # Neither MM1 nor Honeybee says how it follows larger pictures.
            x = x + stretch(self.position_embedding, grid_size, "bicubic_antialias")
        N, L, C = x.shape
        g, s = math.isqrt(L), math.isqrt(self.pooled)
        x = x.reshape(N, g, g, C)
        for block in self.stage1:
            x = block(x)
        x = resample(x, pooling_matrix(g, s))
        for block in self.stage2:
            x = block(x)
        x = x.reshape(N, -1, x.shape[-1])
        for i, linear in enumerate(self.readout):
            x = linear(silu(x) if i else x)
        if "eos_tokens" in self:
            eos = mx.broadcast_to(self.eos_tokens, (N, *self.eos_tokens.shape))
            x = mx.concatenate([x, eos], axis=1)
        return x
