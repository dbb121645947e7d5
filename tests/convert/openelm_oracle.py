"""OpenELM in plain PyTorch, written from Apple's modelling code, not from ours.

https://huggingface.co/apple/OpenELM-3B/blob/main/modeling_openelm.py: one matrix for
queries, keys and values, norms of each head before the rotation, rotation by halves,
one matrix for gate and up, and sizes of its own in every block.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight


def rotate(x: Tensor, theta: float) -> Tensor:
    """Heads [h, T, d] turned by their positions, dimension i with i + d / 2."""
    half = x.shape[-1] // 2
    frequencies = theta ** -(torch.arange(half) / half)
    angles = torch.arange(x.shape[-2])[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)
    turned = (
        torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * turn
    )
    return torch.cat([turned.real, turned.imag], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: Mapping[str, Any], layer: int) -> None:
        super().__init__()
        width, self.head_dim = config["model_dim"], config["head_dim"]
        self.heads = config["num_query_heads"][layer], config["num_kv_heads"][layer]
        self.theta = config.get("rope_freq_constant", 10_000)
        queries, keys = self.heads
        rows = (queries + 2 * keys) * self.head_dim
        self.qkv_proj = nn.Linear(width, rows, bias=False)
        self.out_proj = nn.Linear(queries * self.head_dim, width, bias=False)
        if config.get("normalize_qk_projections"):
            self.q_norm, self.k_norm = Norm(self.head_dim), Norm(self.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys = self.heads
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(0, 1)
        q, k, v = heads.split([queries, keys, keys])
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, self.theta), rotate(k, self.theta)
        k, v = (y.repeat_interleave(queries // keys, dim=0) for y in (k, v))
        scores = q @ k.transpose(1, 2) / self.head_dim**0.5
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        return self.out_proj((weights @ v).transpose(0, 1).flatten(1))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj_1 = nn.Linear(width, 2 * inner, bias=False)
        self.proj_2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.proj_1(x).chunk(2, dim=-1)
        return self.proj_2(nn.functional.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: Mapping[str, Any], layer: int, inner: int) -> None:
        super().__init__()
        width = config["model_dim"]
        self.attn = Attention(config, layer)
        self.ffn = FeedForward(width, inner)
        self.attn_norm, self.ffn_norm = Norm(width), Norm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, config: Mapping[str, Any], inner: list[int]) -> None:
        super().__init__()
        self.token_embeddings = nn.Embedding(config["vocab_size"], config["model_dim"])
        self.layers = nn.ModuleList(Block(config, i, h) for i, h in enumerate(inner))
        self.norm = Norm(config["model_dim"])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class OpenELM(nn.Module):
    """Logits [T, V] of token ids [T].

    Args:
        config: fields of config.json.
        inner: the feed-forward width of every block.
    """

    def __init__(self, config: Mapping[str, Any], inner: list[int]) -> None:
        super().__init__()
        self.transformer = Transformer(config, inner)
        if not config.get("share_input_output_layers"):
            self.lm_head = nn.Linear(
                config["model_dim"], config["vocab_size"], bias=False
            )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer(tokens)
        if hasattr(self, "lm_head"):
            return self.lm_head(x)
        return x @ self.transformer.token_embeddings.weight.T
