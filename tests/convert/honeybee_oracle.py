"""Honeybee's C-Abstractor in plain PyTorch, written from its published description.

Honeybee builds it from timm's RegNet stages, which need torchvision. Here are the same
modules under the same names, so that a state_dict is laid out as a checkpoint's: norms
are called ``bn`` but are LayerNorms over channels, the 3 x 3 convolutions are depthwise,
and the squeeze-and-excitation is as wide as a quarter of its block's input.
"""

from collections import OrderedDict

import torch
from torch import nn


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [N, C, H, W]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNorm(nn.Module):
    """A convolution without bias, and its norm."""

    def __init__(self, inputs: int, outputs: int, kernel: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False
        )
        self.bn = LayerNorm2d(outputs, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))


class SqueezeExcite(nn.Module):
    """Channels scaled by a gate of their means."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, reduced, 1)
        self.fc2 = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.fc1(x.mean((2, 3), keepdim=True))
        return x * self.fc2(nn.functional.silu(gate)).sigmoid()


class Bottleneck(nn.Module):
    """One RegNet block: 1 x 1, depthwise 3 x 3, gate, 1 x 1, and a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs, 1)
        self.conv2 = ConvNorm(outputs, outputs, 3, groups=outputs)
        self.se = SqueezeExcite(outputs, round(inputs * 0.25))
        self.conv3 = ConvNorm(outputs, outputs, 1)
        self.downsample = (
            ConvNorm(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.silu(self.conv1(x))
        y = nn.functional.silu(self.conv2(y))
        y = self.conv3(self.se(y))
        return nn.functional.silu(y + self.downsample(x))


def stage(depth: int, inputs: int, outputs: int) -> nn.Sequential:
    """Blocks b1, b2, ..."""
    blocks = [Bottleneck(inputs if i == 0 else outputs, outputs) for i in range(depth)]
    return nn.Sequential(OrderedDict((f"b{i}", b) for i, b in enumerate(blocks, 1)))


class CAbstractor(nn.Module):
    """Patch features [N, g * g, C] to image tokens [N, s * s + eos, D]."""

    def __init__(
        self,
        patches: int,
        inputs: int,
        outputs: int,
        tokens: int,
        hidden: int = 1024,
        depth: int = 3,
        mlp_depth: int = 2,
        eos: int = 0,
        prenorm: bool = False,
    ) -> None:
        super().__init__()
        side = round(tokens**0.5)
        if prenorm:
            self.prenorm = nn.LayerNorm(inputs, eps=1e-6)
        self.pos_emb = nn.Parameter(torch.zeros(1, patches, inputs))
        self.net = nn.Sequential(
            stage(depth, inputs, hidden),
            nn.AdaptiveAvgPool2d((side, side)),
            stage(depth, hidden, hidden),
        )
        layers: list[nn.Module] = [nn.Linear(hidden, outputs)]
        for _ in range(1, mlp_depth):
            layers += [nn.SiLU(), nn.Linear(outputs, outputs)]
        self.readout = nn.Sequential(*layers)
        if eos:
            self.eos_tokens = nn.Parameter(torch.zeros(1, eos, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "prenorm"):
            x = self.prenorm(x)
        x = x + self.pos_emb
        side = round(x.shape[1] ** 0.5)
        x = self.net(x.transpose(1, 2).unflatten(2, (side, side)))
        x = self.readout(x.flatten(2).transpose(1, 2))
        if hasattr(self, "eos_tokens"):
            x = torch.cat([x, self.eos_tokens.expand(len(x), -1, -1)], dim=1)
        return x
