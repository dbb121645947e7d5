"""xGen-MM's parts in plain PyTorch, under the names that its checkpoints have.

Written from what salesforce/LAVIS's xgen-mm branch and open_clip describe: a ViT whose
patch tokens are normed and go on without the class token; open_flamingo's Perceiver with
heads of their own width, latents joined to the keys and a projection; and a language model
whose vocabulary is the tokenizer's, and some tokens more with rows of their own.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import nn


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """open_clip's ResidualAttentionBlock."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 2 * width),
                gelu=QuickGELU(),
                c_proj=nn.Linear(2 * width, width),
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    """Patch tokens [N, L, C], as ``output_tokens`` makes open_clip give them."""

    def __init__(
        self, side: int, patch: int, width: int, heads: int, depth: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        places = (side // patch) ** 2 + 1
        self.positional_embedding = nn.Parameter(torch.zeros(places, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.transformer.resblocks = blocks
        # Of CLIP's space, which nobody asks for.
        self.proj = nn.Parameter(torch.zeros(width, width))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([cls, x], dim=1) + self.positional_embedding)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(x)[:, 1:]


class PerceiverAttention(nn.Module):
    """Latents [N, K, C] look at features [N, L, C] and themselves."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        inner = heads * dim_head
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        latents = self.norm_latents(latents)
        q = self.to_q(latents) * self.scale
        k, v = self.to_kv(torch.cat([self.norm_media(x), latents], 1)).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, k, v))
        weights = torch.einsum("nihd,njhd->nhij", q, k).softmax(dim=-1)
        seen = torch.einsum("nhij,njhd->nihd", weights, v)
        return self.to_out(seen.flatten(2))


class Perceiver(nn.Module):
    """Image tokens [N, K, D] of features [N, L, C]."""

    def __init__(
        self, dim: int, out: int, latents: int, depth: int, heads: int, dim_head: int
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(latents, dim))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(dim, heads, dim_head),
                    nn.Sequential(
                        nn.LayerNorm(dim),
                        nn.Linear(dim, 4 * dim, bias=False),
                        nn.GELU(),
                        nn.Linear(4 * dim, dim, bias=False),
                    ),
                ]
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim, out)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        latents = self.latents.expand(len(features), -1, -1)
        for attention, mlp in self.layers:
            latents = attention(features, latents) + latents
            latents = mlp(latents) + latents
        return self.projection(self.norm(latents))


class Embedding(nn.Embedding):
    """The tokenizer's tokens, and some more with rows of their own after them."""

    def __init__(self, rows: int, known: int, added: int, width: int) -> None:
        super().__init__(rows, width)
        self.known = known
        self.additional_embedding = nn.Embedding(added, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = [
            self.weight[t]
            if t < self.known
            else self.additional_embedding.weight[t - self.known]
            for t in tokens.flatten().tolist()
        ]
        return torch.stack(rows).reshape(*tokens.shape, -1)


class Head(nn.Linear):
    """Logits of the tokenizer's tokens, and of some more after them."""

    def __init__(
        self, width: int, rows: int, known: int, added: int, bias: bool
    ) -> None:
        super().__init__(width, rows, bias=bias)
        self.known = known
        self.additional_fc = nn.Linear(width, added, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [super().forward(x)[..., : self.known], self.additional_fc(x)], dim=-1
        )


class XGenMM(nn.Module):
    """The whole model; ``vlm`` holds its parts, as the hub's wrapper does."""

    def __init__(self, encoder: Encoder, perceiver: Perceiver, lang_model: Any) -> None:
        super().__init__()
        self.vlm = nn.Module()
        self.vlm.vision_encoder = encoder
        self.vlm.vision_tokenizer = perceiver
        self.vlm.lang_model = lang_model

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Image tokens [N, K, D] of pixels [N, 3, H, W]."""
        return self.vlm.vision_tokenizer(self.vlm.vision_encoder(pixels))
