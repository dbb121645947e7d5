"""The pre-norm transformer block that the image encoder and the text tower share."""

from typing import Literal, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from mm1_mlx.config import VisionConfig, VisionMoEConfig
from mm1_mlx.kernels import attend
from mm1_mlx.models.activation import ACTIVATIONS


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
        x = attend(q, k, v, cache=None, scale=self.scale, mask=mask)
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
        dtype = x.dtype
        experts, weights = self.route(x)
        if mx.default_device() == mx.cpu:
            # mlx's CPU backend gathers matrices in float32 only.
            x = x.astype(mx.float32)
        x = x[:, None]  # [N, 1, L, D], against experts [N, k]
        y = self.activation(self.fc1(x, experts))
        y = self.fc2(y * self.fc3(x, experts) if "fc3" in self else y, experts)
        y = (y * weights[..., None, None].astype(y.dtype)).sum(axis=1)
        return y.astype(dtype)

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The experts of every image and their weights, [N, k] both."""
        k = self.moe.experts_per_image
        # In float32: half precision moves images between nearly tied experts.
        x = x.astype(mx.float32)
        pooled = x.mean(axis=1) if self.moe.router_input == "mean" else x[:, 0]
        probabilities = mx.softmax(self.router(pooled), axis=-1)
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
