"""The image encoder: tiles [N, H, W, 3] to patch features [N, L, C].

MM1 (arXiv 2403.09611), section 3.1: CLIP's ViT-L/14 and ViT-H/14, and AIM; by other
fields of the config AIMv2 and Mobile V-MoE.
"""

from functools import lru_cache
from typing import Literal, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchLinear
from numpy.typing import NDArray

from mm1_mlx.config import VisionConfig, VisionMoEConfig
from mm1_mlx.errors import ConfigError
from mm1_mlx.models.activation import ACTIVATIONS
from mm1_mlx.models.resample import stretch


class BlockConfig(Protocol):
    """What a block reads of its tower's config, an image encoder's or a text tower's."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def norm(self) -> Literal["layer", "rms"]: ...
    @property
    def layer_norm_eps(self) -> float: ...
    @property
    def attention_bias(self) -> bool: ...
    @property
    def mlp_bias(self) -> bool: ...
    @property
    def gated_mlp(self) -> bool: ...


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


class Attention(nn.Module):
    """Multi-head self-attention, bidirectional without a mask."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        D, bias = config.hidden_size, config.attention_bias
        self.num_heads = config.num_attention_heads
        self.scale = (D // self.num_heads) ** -0.5
        self.q_proj = nn.Linear(D, D, bias)
        self.k_proj = nn.Linear(D, D, bias)
        self.v_proj = nn.Linear(D, D, bias)
        self.out_proj = nn.Linear(D, D, bias)

    def __call__(self, x: mx.array, mask: str | None = None) -> mx.array:
        N, L, D = x.shape
        q, k, v = (
            proj(x).reshape(N, L, self.num_heads, -1).transpose(0, 2, 1, 3)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=mask)
        return self.out_proj(x.transpose(0, 2, 1, 3).reshape(N, L, D))


class MLP(nn.Module):
    """Two linear layers with the tower's activation, or a gate, between them."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        D, H, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(D, H, bias)
        self.fc2 = nn.Linear(H, D, bias)
        if config.gated_mlp:
            self.fc3 = nn.Linear(D, H, bias)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.activation(self.fc1(x))
        return self.fc2(y * self.fc3(x) if "fc3" in self else y)


class SparseMLP(nn.Module):
    """The gate-weighted sum of k experts' MLPs, the same ones for a whole image.

    Args:
        x: normed states of every place, [N, L, D].

    Source: Mobile V-MoE (arXiv 2309.04354).
    """

    def __init__(self, config: VisionConfig, moe: VisionMoEConfig) -> None:
        super().__init__()
        D, H, E = config.hidden_size, config.intermediate_size, moe.num_experts
        bias = config.mlp_bias
        self.moe = moe
        self.activation = ACTIVATIONS[config.hidden_act]
        self.router = nn.Linear(D, E, bias=False)
        self.fc1 = SwitchLinear(D, H, E, bias)
        self.fc2 = SwitchLinear(H, D, E, bias)
        if config.gated_mlp:
            self.fc3 = SwitchLinear(D, H, E, bias)

    def __call__(self, x: mx.array) -> mx.array:
        experts, weights = self.route(x)
        x = x[:, None]  # [N, 1, L, D], against experts [N, k]
        y = self.activation(self.fc1(x, experts))
        y = self.fc2(y * self.fc3(x, experts) if "fc3" in self else y, experts)
        return (y * weights[..., None, None].astype(y.dtype)).sum(axis=1)

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The experts of every image and their weights, [N, k] both."""
        k = self.moe.experts_per_image
        pooled = x.mean(axis=1) if self.moe.router_input == "mean" else x[:, 0]
        # In float32: half precision moves images between nearly tied experts.
        probabilities = mx.softmax(self.router(pooled).astype(mx.float32), axis=-1)
        experts = mx.argpartition(-probabilities, kth=k - 1, axis=-1)[..., :k]
        weights = mx.take_along_axis(probabilities, experts, axis=-1)
        if self.moe.norm_topk_prob:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return experts, weights


def norm(config: BlockConfig) -> nn.Module:
    """A norm over the tower's width, of the config's kind."""
    kind = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[config.norm]
    return kind(config.hidden_size, config.layer_norm_eps)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.layer_norm1 = norm(config)
        self.self_attn = Attention(config)
        self.layer_norm2 = norm(config)
        self.mlp: nn.Module = MLP(config)

    def __call__(self, x: mx.array, mask: str | None = None) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


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
            x = layer(x)
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
        x = x + positions
        if not config.class_token:
            return x
        cls = self.class_embedding + (classes[0] if classes.shape[0] else 0)
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
