"""A sparse feed-forward layer: each token through its top-k experts.

MM1 (arXiv 2403.09611), section 3.5, top-2; the gate, its capacity and its losses are
those of axlearn's Top2Gating, without a capacity unless the config gives one.

Source: https://github.com/apple/axlearn/blob/34aed43c1b6e581c4753d06d7cbeedd5010ef26b/
axlearn/common/mixture_of_experts.py
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear
from numpy.typing import NDArray

from mm1_mlx.config import DecoderConfig, MoEConfig
from mm1_mlx.models.activation import silu
from mm1_mlx.models.linear import PackedSwitchLinear, expert_products

# Rows up to which sorting costs more than it saves: a token that is decoded.
FEW_ROWS = 2


class SparseMLP(nn.Module):
    """The gate-weighted sum of k experts, [B, T, D] to [B, T, D]."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None
        self.moe = config.moe
        D, E = config.hidden_size, self.moe.num_experts
        self.gate = nn.Linear(D, E, bias=False)
        self.switch_mlp = SwitchGLU(D, config.sizes(layer).intermediate_size, E)
        # Of the processes that each hold a part of every expert, if several do.
        self.group: mx.distributed.Group | None = None

    def __call__(self, x: mx.array) -> mx.array:
        return self.routed(x)[0]

    def routed(
        self, x: mx.array, real: NDArray[np.bool_] | None = None
    ) -> tuple[mx.array, mx.array]:
        """The layer's output [B, T, D], and the gate's logits [B, T, E] in float32.

        ``real`` [B, T] says which tokens are no padding, None that all are.
        """
        # In float32: half precision moves tokens between nearly tied experts.
        logits = self.gate(x.astype(mx.float32))
        experts, weights = choose(logits, self.moe, real)
        outputs = self._outputs(x, experts) * weights[..., None].astype(x.dtype)
        output = outputs.sum(axis=-2)
        if self.group is not None:
            output = mx.distributed.all_sum(output, group=self.group)
        return output, logits

    def _outputs(self, x: mx.array, experts: mx.array) -> mx.array:
        """What the chosen experts [B, T, k] make of their tokens, [B, T, k, D]."""
        glu = self.switch_mlp
        plain = all(
            type(glu[name]) in (SwitchLinear, PackedSwitchLinear)
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        if mx.default_device() != mx.cpu:
            return glu(x, experts)
        # mlx's CPU backend gathers matrices row by row, and in float32 only.
        if plain and (experts.size > FEW_ROWS or x.dtype != mx.float32):
            chosen = _on_host(experts)
            if chosen is not None:
                return self._sorted(x, chosen)
        return glu(x.astype(mx.float32), experts).astype(x.dtype)

    def _sorted(self, x: mx.array, experts: NDArray[np.uint32]) -> mx.array:
        """``SwitchGLU`` as one dense product per expert over its tokens' rows."""
        k = experts.shape[-1]
        order = np.argsort(experts, axis=None, kind="stable")
        present, counts = np.unique(experts, return_counts=True)
        rows = mx.split(
            x.flatten(0, -2)[mx.array(order // k)], np.cumsum(counts)[:-1].tolist()
        )
        glu = self.switch_mlp
        gates, ups, downs = map(
            expert_products, (glu.gate_proj, glu.up_proj, glu.down_proj)
        )
        outputs = []
        for e, tokens in zip(present.tolist(), rows, strict=True):
            # Not mlx-lm's activation: on a CPU an exponential costs as much as a product.
            gate = silu(gates(e, tokens))
            outputs.append(downs(e, gate * ups(e, tokens)))
        places = mx.array(np.argsort(order))
        return mx.concatenate(outputs)[places].reshape(*experts.shape, -1)


def _on_host(experts: mx.array) -> NDArray[np.uint32] | None:
    """The experts' numbers; None where mlx only traces, as for ``mx.compile``."""
    try:
        return np.array(experts)
    except ValueError:
        return None


def choose(
    logits: mx.array, moe: MoEConfig, real: NDArray[np.bool_] | None = None
) -> tuple[mx.array, mx.array]:
    """Every token's experts, best first, and their weights, both [B, T, k].

    An expert that is over its capacity has weight 0, and the others keep theirs. Padding,
    where ``real`` [B, T] tells it apart, neither takes a place nor adds to the capacity.
    """
    probabilities = mx.softmax(logits, axis=-1)
    # A stable sort: of equal experts the first is the better, as argmax has it.
    best = mx.argsort(mx.stop_gradient(-probabilities), axis=-1)
    experts = best[..., : moe.experts_per_token]
    weights = mx.take_along_axis(probabilities, experts, axis=-1)
    if moe.norm_topk_prob:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-9)
    if moe.capacity_factor is not None:
        E = logits.shape[-1]
        everything = np.ones(logits.shape[:-1], np.bool_)
        kept = within_capacity(
            experts, E, moe.capacity_factor, everything if real is None else real
        )
        weights = weights * kept
    return experts, weights


def within_capacity(
    experts: mx.array, num_experts: int, factor: float, real: NDArray[np.bool_]
) -> mx.array:
    """Whether each choice [B, T, k] gets one of its expert's places.

    A row with S ``real`` tokens has S * ``factor`` / E places per expert, and at least
    one. All first choices take theirs in the order of the tokens, then all second ones,
    and so on.
    """
    B, T, k = experts.shape
    # On the host: the floor of a product that float32 rounded may be one less.
    places = (real.sum(axis=1) * factor / num_experts).astype(np.int64)
    queue = experts.swapaxes(1, 2).reshape(B, k * T, 1)
    waits = mx.array(np.tile(real, k))[..., None] & (queue == mx.arange(num_experts))
    waiting = mx.cumsum(waits, axis=1)  # [B, k * T, E]
    place = mx.take_along_axis(waiting, queue, axis=-1).squeeze(-1)
    kept = place <= mx.array(np.maximum(1, places))[:, None]
    return kept.reshape(B, k, T).swapaxes(1, 2)


def load_balance_loss(logits: mx.array, real: mx.array) -> mx.array:
    """E * sum over experts of f * P, the mean of all rows: 1 where either is uniform.

    f is the share of a row's tokens whose first choice the expert is, P its mean
    probability there.

    Args:
        logits: of a gate, float32 [B, T, E].
        real: whether a token is one, and not padding, [B, T].
    """
    E = logits.shape[-1]
    share = real / mx.maximum(real.sum(axis=-1, keepdims=True), 1)
    first = mx.argmax(logits, axis=-1, keepdims=True) == mx.arange(E)
    f = (first * share[..., None]).sum(axis=-2)
    P = (mx.softmax(logits, axis=-1) * share[..., None]).sum(axis=-2)
    return E * (f * P).sum(axis=-1).mean()


def router_z_loss(logits: mx.array, real: mx.array) -> mx.array:
    """The mean square of logsumexp over the experts, of all real tokens; args as above."""
    squares = mx.logsumexp(logits, axis=-1).square()
    return (squares * real).sum() / real.sum()
