"""AIM and AIMv2 in plain torch, as apple/ml-aim describes them.

Written from aim-v1/aim/v1/torch and aim-v2/aim/v2/torch at bd9e068, with their names.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, silu


def sincos(grid: int, width: int) -> torch.Tensor:
    """Of the column in the first half of the width, of the row in the second."""
    rates = [1 / 10_000 ** (i / (width // 4)) for i in range(width // 4)]
    table = torch.zeros(grid * grid, width)
    quarter = width // 4
    for row in range(grid):
        for column in range(grid):
            for i, rate in enumerate(rates):
                cell = table[row * grid + column]
                for half, place in enumerate((column, row)):
                    angle = torch.tensor(place * rate)
                    cell[2 * half * quarter + i] = angle.sin()
                    cell[(2 * half + 1) * quarter + i] = angle.cos()
    return table


class Patchifier(nn.Module):
    def __init__(self, patch: int, width: int, norm: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)
        self.norm = norm(width)

    def forward(self, pixels: Any) -> Any:
        return self.norm(self.proj(pixels).flatten(2).transpose(1, 2))


class Preprocessor(nn.Module):
    def __init__(self, patchifier: nn.Module, places: int, width: int) -> None:
        super().__init__()
        self.patchifier = patchifier
        if places:
            self.pos_embed = nn.Parameter(torch.zeros(1, places, width))

    def forward(self, pixels: Any) -> Any:
        x = self.patchifier(pixels)
        if hasattr(self, "pos_embed"):
            return x + self.pos_embed
        return x + sincos(int(x.shape[1] ** 0.5), x.shape[2])


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Any) -> Any:
        N, L, D = x.shape
        q, k, v = (
            part.reshape(N, L, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x).split(D, dim=-1)
        )
        scores = (q @ k.mT) * (D // self.heads) ** -0.5
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(N, L, D))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, gated: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)
        if gated:
            self.fc3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Any) -> Any:
        if hasattr(self, "fc3"):
            return self.fc2(silu(self.fc1(x)) * self.fc3(x))
        return self.fc2(gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(
        self, width: int, hidden: int, heads: int, gated: bool, norm: Any
    ) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = norm(width), norm(width)
        self.attn = Attention(width, heads)
        self.mlp = MLP(width, hidden, gated)

    def forward(self, x: Any) -> Any:
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Trunk(nn.Module):
    def __init__(self, blocks: int, norm: Any, width: int, *arguments: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, *arguments, norm) for _ in range(blocks)
        )
        self.post_trunk_norm = norm(width)

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.post_trunk_norm(x)


class Head(nn.Module):
    """What classifies, of no use to an encoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.k, self.v = (nn.Linear(width, width, bias=False) for _ in "kv")
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.linear = nn.Linear(width, 10, bias=False)
        self.bn = nn.BatchNorm1d(width, affine=False)


class AIM(nn.Module):
    """Patch features [N, L, D] of pixels [N, 3, H, W]; AIMv2's where ``v2``."""

    def __init__(
        self,
        *,
        size: int,
        patch: int,
        width: int,
        hidden: int,
        blocks: int,
        heads: int,
        v2: bool = False,
        sincos: bool = False,
    ) -> None:
        super().__init__()
        norm = nn.RMSNorm if v2 else nn.LayerNorm
        eps = 1e-5 if v2 else 1e-6

        def make(width: int) -> nn.Module:
            return norm(width, eps=eps)

        learned = v2 and not sincos
        places = (size // patch) ** 2 if learned else 0
        self.preprocessor = Preprocessor(Patchifier(patch, width, make), places, width)
        self.trunk = Trunk(blocks, make, width, hidden, heads, v2)
        if not v2:
            self.head = Head(width)

    def forward(self, pixels: Any) -> Any:
        return self.trunk(self.preprocessor(pixels))
