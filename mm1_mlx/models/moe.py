"""A sparse feed-forward layer: each token through its top-k experts.

MM1 (arXiv 2403.09611), section 3.5, top-2; the gate follows axlearn's Top2Gating
without its capacity limit: nothing is dropped.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU

from mm1_mlx.config import DecoderConfig


class SparseMLP(nn.Module):
    """The gate-weighted sum of k experts, [B, T, D] to [B, T, D]."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None
        self.moe = config.moe
        D, E = config.hidden_size, self.moe.num_experts
        self.gate = nn.Linear(D, E, bias=False)
        self.switch_mlp = SwitchGLU(D, config.sizes(layer).intermediate_size, E)

    def __call__(self, x: mx.array) -> mx.array:
        k = self.moe.experts_per_token
        # In float32: half precision moves tokens between nearly tied experts.
        probabilities = mx.softmax(self.gate(x).astype(mx.float32), axis=-1)
        experts = mx.argpartition(-probabilities, kth=k - 1, axis=-1)[..., :k]
        weights = mx.take_along_axis(probabilities, experts, axis=-1)
        if self.moe.norm_topk_prob:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-9)
        outputs = self.switch_mlp(x, experts)  # [B, T, k, D]
        return (outputs * weights[..., None].astype(x.dtype)).sum(axis=-2)
