"""An axlearn decoder of the honeycrisp kind in plain PyTorch, on axlearn's own tensors.

Written from axlearn at 34aed43, not from our code: ``axlearn/common/attention.py``
(``FusedGroupedQKVLinear``, ``apply_rotary_position_embeddings``, ``ScaleQuery``, which
``MultiheadAttention`` applies after the rotation, ``compute_gqa_logits``,
``TransformerFeedForwardLayer``), ``layers.py`` (``RMSNorm``), ``repeat.py`` (layers
stacked along the first axis) and ``decoder.py`` (logits by the token embedding).
"""

import torch
from torch import Tensor

State = dict[str, Tensor]
LAYER = "decoder/transformer/repeat/layer/"


def make_state(
    layers: int, width: int, heads: int, kv_heads: int, inner: int, vocabulary: int,
    seed: int,
) -> State:  # fmt: skip
    """A state whose every tensor shows when it lands in the wrong place."""
    generator = torch.Generator().manual_seed(seed)
    head = width // heads

    def matrix(fan_in: int, *shape: int) -> Tensor:
        return torch.randn(layers, *shape, generator=generator) * fan_in**-0.5

    def scale(*shape: int) -> Tensor:
        return 0.8 + 0.4 * torch.rand(*shape, generator=generator)

    attention = f"{LAYER}self_attention/attention/"
    return {
        "decoder/emb/token_emb/weight": 0.03
        * torch.randn(vocabulary, width, generator=generator),
        "decoder/output_norm/scale": scale(width),
        f"{LAYER}self_attention/norm/scale": scale(layers, width),
        f"{attention}i_proj/i_proj/qkv_proj/weight": matrix(
            width, width, heads + 2 * kv_heads, head
        ),
        f"{attention}o_proj/weight": matrix(width, width, heads, head),
        f"{attention}scale_query/norm/scale": scale(layers, head),
        f"{attention}scale_key/norm/scale": scale(layers, head),
        f"{LAYER}feed_forward/norm/scale": scale(layers, width),
        f"{LAYER}feed_forward/linear1_0/weight": matrix(width, width, inner),
        f"{LAYER}feed_forward/linear1_1/weight": matrix(width, width, inner),
        f"{LAYER}feed_forward/linear2/weight": matrix(inner, inner, width),
    }


def norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * scale


def rotate(x: Tensor, theta: float) -> Tensor:
    """[T, h, d] with neighbouring dimensions turned together."""
    T, _, d = x.shape
    angles = torch.arange(T)[:, None] / theta ** (2 * torch.arange(d // 2) / d)
    sin, cos = (
        f(angles).repeat_interleave(2, dim=-1)[:, None] for f in (torch.sin, torch.cos)
    )
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).reshape(x.shape)
    return x * cos + turned * sin


def attend(x: Tensor, p: State, heads: int, theta: float, eps: float) -> Tensor:
    proj = torch.einsum("td,dnh->tnh", x, p["i_proj/i_proj/qkv_proj/weight"])
    kv_heads = (proj.shape[1] - heads) // 2
    q, k, v = proj.split([heads, kv_heads, kv_heads], dim=1)
    q = norm(rotate(q, theta), p["scale_query/norm/scale"], eps) * q.shape[-1] ** -0.5
    k = norm(rotate(k, theta), p["scale_key/norm/scale"], eps)
    groups = q.unflatten(1, (kv_heads, -1))
    logits = torch.einsum("tkgh,skh->kgts", groups, k)
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    probs = logits.masked_fill(future, -torch.inf).softmax(-1)
    context = torch.einsum("kgts,skh->tkgh", probs, v).flatten(1, 2)
    return torch.einsum("tnh,dnh->td", context, p["o_proj/weight"])


def forward(
    state: State, tokens: Tensor, *, heads: int, theta: float, eps: float
) -> Tensor:
    """Logits [T, V] of token ids [T]."""
    table = state["decoder/emb/token_emb/weight"]
    x = table[tokens]
    stacked = {
        name.removeprefix(LAYER): value
        for name, value in state.items()
        if name.startswith(LAYER)
    }
    for i in range(len(stacked["feed_forward/norm/scale"])):
        p = {name: value[i] for name, value in stacked.items()}
        prefix = "self_attention/attention/"
        attention = {
            n.removeprefix(prefix): y for n, y in p.items() if n.startswith(prefix)
        }
        y = norm(x, p["self_attention/norm/scale"], eps)
        x = x + attend(y, attention, heads, theta, eps)
        y = norm(x, p["feed_forward/norm/scale"], eps)
        gate = y @ p["feed_forward/linear1_0/weight"]
        y = gate * torch.sigmoid(gate) * (y @ p["feed_forward/linear1_1/weight"])
        x = x + y @ p["feed_forward/linear2/weight"]
    return norm(x, state["decoder/output_norm/scale"], eps) @ table.T
