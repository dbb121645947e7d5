"""Image encoders: tiles [N, H, W, 3] to patch features [N, L, C].

MM1 (arXiv 2403.09611), section 3.1: CLIP ViT-L/14 and ViT-H/14.
"""

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.config import VisionConfig
from mm1_mlx.models.activation import ACTIVATIONS


class PatchEmbedding(nn.Module):
    """Embeddings [N, L, D] of the P x P patches of [N, H, W, 3], in raster order.

    A convolution whose stride is its kernel, computed as the matrix product it is.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        P, D = config.patch_size, config.hidden_size
        scale = (P * P * 3) ** -0.5
        self.weight = mx.random.normal((D, P, P, 3), scale=scale)

    def __call__(self, pixels: mx.array) -> mx.array:
        D, P = self.weight.shape[:2]
        N, H, W, C = pixels.shape
        x = pixels.reshape(N, H // P, P, W // P, P, C)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(N, -1, P * P * C)
        return x @ self.weight.reshape(D, -1).T


class Attention(nn.Module):
    """Bidirectional multi-head self-attention with biases."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.scale = (D // self.num_heads) ** -0.5
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def __call__(self, x: mx.array) -> mx.array:
        N, L, D = x.shape
        q, k, v = (
            proj(x).reshape(N, L, self.num_heads, -1).transpose(0, 2, 1, 3)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.out_proj(x.transpose(0, 2, 1, 3).reshape(N, L, D))


class MLP(nn.Module):
    """Two linear layers with the encoder's activation between them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """Features of every patch, [N, L, D], in raster order.

    The class token attends with the patches and is left out of the result where the
    config says so. Only the blocks up to the feature layer exist.

    Source: OpenAI CLIP's VisionTransformer; names as in Hugging Face's CLIPVisionModel
    (whose ``pre_layrnorm`` is spelled out here).
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.image_size = config.image_size
        self.drop_cls = config.drop_cls
        self.patch_embedding = PatchEmbedding(config)
        self.class_embedding = mx.random.normal((D,), scale=0.02)
        self.position_embedding = mx.random.normal(
            (config.num_patches + 1, D), scale=0.02
        )
        self.pre_layernorm = nn.LayerNorm(D, config.layer_norm_eps)
        self.layers = [Block(config) for _ in range(config.depth)]
        if config.apply_post_norm:
            self.post_layernorm = nn.LayerNorm(D, config.layer_norm_eps)

    def __call__(self, pixels: mx.array) -> mx.array:
        if pixels.shape[1:] != (self.image_size, self.image_size, 3):
            size = self.image_size
            raise ValueError(
                f"tiles have shape {pixels.shape}, expected [N, {size}, {size}, 3]"
            )
        x = self.patch_embedding(pixels.astype(self.class_embedding.dtype))
        N, _, D = x.shape
        cls = mx.broadcast_to(self.class_embedding, (N, 1, D))
        x = mx.concatenate([cls, x], axis=1) + self.position_embedding
        x = self.pre_layernorm(x)
        for layer in self.layers:
            x = layer(x)
        if "post_layernorm" in self:
            x = self.post_layernorm(x)
        return x[:, 1:] if self.drop_cls else x


ENCODERS = {"clip": CLIPEncoder}
