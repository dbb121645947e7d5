"""The image encoder: tiles [N, H, W, 3] to patch features [N, L, C].

MM1 (arXiv 2403.09611), section 3.1: CLIP's ViT-L/14 and ViT-H/14, and AIM; by other
fields of the config AIMv2 and Mobile V-MoE.
"""

from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mm1_mlx.config import VisionConfig
from mm1_mlx.errors import ConfigError
from mm1_mlx.models.block import Block, SparseMLP, norm
from mm1_mlx.models.recompute import recomputed
from mm1_mlx.models.resample import stretch


class PatchEmbedding(nn.Module):
    """Embeddings [N, L, D] of the P x P patches of [N, H, W, 3], in raster order.

    A convolution whose stride is its kernel, computed as the matrix product it is.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        P, D = config.patch_size, config.hidden_size
        scale = (P * P * 3) ** -0.5
        self.weight = mx.random.normal((D, P, P, 3), scale=scale)
        if config.patch_bias:
            self.bias = mx.zeros((D,))

    def __call__(self, pixels: mx.array) -> mx.array:
        D, P = self.weight.shape[:2]
        N, H, W, C = pixels.shape
        x = pixels.reshape(N, H // P, P, W // P, P, C)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(N, -1, P * P * C)
        x = x @ self.weight.reshape(D, -1).T
        return x + self.bias if "bias" in self else x


class VisionEncoder(nn.Module):
    """Features of every patch, [N, L, D], in raster order.

    Tiles are square, of any multiple of the patch: a learned position embedding is
    stretched to their grid. A class token attends with the patches and is left out of
    the result where the config says so. Only the blocks up to the feature layer exist.

    Source: OpenAI CLIP's VisionTransformer, Apple's ml-aim; names as in Hugging Face's
    CLIPVisionModel (whose ``pre_layrnorm`` is spelled out here).
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.config = config
        # Whether blocks are computed again for their gradients.
        self.recompute = False
        self.patch_embedding = PatchEmbedding(config)
        if config.patch_norm:
            self.patch_layernorm = norm(config)
        if config.class_token:
            self.class_embedding = mx.random.normal((D,), scale=0.02)
        if config.position == "learned":
            rows = config.num_patches + config.class_token
            self.position_embedding = mx.random.normal((rows, D), scale=0.02)
        if config.pre_norm:
            self.pre_layernorm = norm(config)
        self.layers = [Block(config) for _ in range(config.depth)]
        for i, layer in enumerate(self.layers):
            if config.moe and config.is_sparse(i):
                layer.mlp = SparseMLP(config, config.moe)
        if config.apply_post_norm:
            self.post_layernorm = norm(config)
        if config.projection_size:
            self.projection = nn.Linear(D, config.projection_size, bias=False)

    def __call__(self, pixels: mx.array) -> mx.array:
        x = self._states(pixels)
        return x[:, 1:] if self.config.class_token and self.config.drop_cls else x

    def project(self, pixels: mx.array) -> mx.array:
        """CLIP's embeddings [N, P] of tiles [N, H, W, 3], not normalised.

        Raises:
            ConfigError: the encoder has no projection to CLIP's space.
        """
        if "projection" not in self:
            raise ConfigError(
                "the encoder has no projection to a space shared with text; convert a "
                "whole CLIP model"
            )
        return self.projection(self._states(pixels)[:, 0])

    def _states(self, pixels: mx.array) -> mx.array:
        """The feature layer's states [N, L, D], the class token first if there is one."""
        grid_size = self._grid_size(pixels)
        x = self.patch_embedding(pixels.astype(self.patch_embedding.weight.dtype))
        if "patch_layernorm" in self:
            x = self.patch_layernorm(x)
        x = self._place(x, grid_size)
        if "pre_layernorm" in self:
            x = self.pre_layernorm(x)
        for layer in self.layers:
            x = recomputed(layer)(x) if self.recompute else layer(x)
        return self.post_layernorm(x) if "post_layernorm" in self else x

    def _grid_size(self, pixels: mx.array) -> int:
        _, height, width, channels = pixels.shape
        P = self.config.patch_size
        if height != width or height % P or channels != 3:
            raise ValueError(
                f"tiles have shape {pixels.shape}, expected [N, S, S, 3] where S is a "
                f"multiple of {P}"
            )
        return height // P

    def _place(self, x: mx.array, grid_size: int) -> mx.array:
        """Patches [N, L, D] with their positions, behind the class token."""
        config, (N, _, D) = self.config, x.shape
        if config.position == "sincos":
            positions = mx.array(sincos(grid_size, D)).astype(x.dtype)
            classes = mx.zeros((0, D), x.dtype)
        else:
            classes, table = mx.split(
                self.position_embedding, [int(config.class_token)]
            )
            positions = stretch(table, grid_size, config.interpolation)
        # Packed checkpoints may hold bare arrays in another precision.
        x = x + positions.astype(x.dtype)
        if not config.class_token:
            return x
        cls = self.class_embedding + (classes[0] if classes.shape[0] else 0)
        cls = cls.astype(x.dtype)
        return mx.concatenate([mx.broadcast_to(cls, (N, 1, D)), x], axis=1)


@lru_cache(maxsize=8)
def sincos(grid_size: int, size: int) -> NDArray[np.float32]:
    """Fixed position embeddings [g * g, size]: of the column, then of the row.

    Source: ``SinCosPosEmbed`` of apple/ml-aim at bd9e068.
    """
    frequencies = 10_000.0 ** -(np.arange(size // 4) / (size / 4))
    angles = np.arange(grid_size)[:, None] * frequencies
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns = np.tile(axis, (grid_size, 1))
    rows = np.repeat(axis, grid_size, axis=0)
    return np.concatenate([columns, rows], axis=1).astype(np.float32)
