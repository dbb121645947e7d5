"""Connectors whose learned queries attend over the features.

MM1 (arXiv 2403.09611), section 3.2, names attention pooling without its internals.
"""

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.config import AttentionPoolConfig, PerceiverConfig


def attend(q: mx.array, k: mx.array, v: mx.array, num_heads: int) -> mx.array:
    """Every query [N, K, H * d] attends over keys and values [N, L, H * d]."""
    N, K, D = q.shape
    q, k, v = (
        x.reshape(N, -1, num_heads, D // num_heads).transpose(0, 2, 1, 3)
        for x in (q, k, v)
    )
    scale = (D // num_heads) ** -0.5
    x = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    return x.transpose(0, 2, 1, 3).reshape(N, K, D)


class AttentionPool(nn.Module):
    """Image tokens as learned queries' views of all features.

    Source: CoCa (arXiv 2205.01917); ``AttentionalPooler`` of mlfoundations/open_clip at
    89fb801, followed by a norm.
    """

    def __init__(self, config: AttentionPoolConfig) -> None:
        super().__init__()
        C, D, eps = config.input_size, config.output_size, config.layer_norm_eps
        self.num_heads = config.num_attention_heads
        self.query = mx.random.normal((config.num_image_tokens, D), scale=D**-0.5)
        self.query_norm = nn.LayerNorm(D, eps)
        self.feature_norm = nn.LayerNorm(C, eps)
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(C, D)
        self.v_proj = nn.Linear(C, D)
        self.out_proj = nn.Linear(D, D)
        self.norm = nn.LayerNorm(D, eps)

    def __call__(self, features: mx.array) -> mx.array:
        x = self.feature_norm(features)
        q = self.q_proj(self.query_norm(self.query))
        q = mx.broadcast_to(q, (x.shape[0], *q.shape))
        x = attend(q, self.k_proj(x), self.v_proj(x), self.num_heads)
        return self.norm(self.out_proj(x))


class PerceiverLayer(nn.Module):
    """Latents [N, K, C] after attention over features and themselves, and an MLP."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        C, eps = config.input_size, config.layer_norm_eps
        inner = config.num_attention_heads * config.head_dim
        self.num_heads = config.num_attention_heads
        self.feature_norm = nn.LayerNorm(C, eps)
        self.latent_norm = nn.LayerNorm(C, eps)
        self.q_proj = nn.Linear(C, inner, bias=False)
        self.k_proj = nn.Linear(C, inner, bias=False)
        self.v_proj = nn.Linear(C, inner, bias=False)
        self.out_proj = nn.Linear(inner, C, bias=False)
        self.mlp_norm = nn.LayerNorm(C, eps)
        self.fc1 = nn.Linear(C, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, C, bias=False)

    def __call__(self, latents: mx.array, features: mx.array) -> mx.array:
        q = self.latent_norm(latents)
        x = mx.concatenate([self.feature_norm(features), q], axis=1)
        x = attend(self.q_proj(q), self.k_proj(x), self.v_proj(x), self.num_heads)
        latents = latents + self.out_proj(x)
        return latents + self.fc2(nn.gelu(self.fc1(self.mlp_norm(latents))))


class Perceiver(nn.Module):
    """Image tokens as latents that read the features layer by layer.

    Source: Flamingo (arXiv 2204.14198); ``PerceiverResampler`` of open_flamingo's
    src/helpers.py, and xGen-MM's projection behind it.
    """

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        C = config.input_size
        self.latents = mx.random.normal((config.num_image_tokens, C), scale=0.02)
        self.layers = [PerceiverLayer(config) for _ in range(config.depth)]
        self.norm = nn.LayerNorm(C, config.layer_norm_eps)
        self.projection = nn.Linear(C, config.output_size)

    def __call__(self, features: mx.array) -> mx.array:
        latents = mx.broadcast_to(
            self.latents, (features.shape[0], *self.latents.shape)
        )
        for layer in self.layers:
            latents = layer(latents, features)
        return self.projection(self.norm(latents))
