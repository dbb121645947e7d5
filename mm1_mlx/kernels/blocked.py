"""Attention on a CPU, a block of scores at a time: what its caches hold is not waited for.

mlx's CPU backend computes all scores at once, those that a causal mask hides too, and
their exponentials one by one. Here a block's scores, weights and sums are done before
the next one's, hidden keys are left out, and powers of two stand for exponentials.
"""

from __future__ import annotations

import mlx.core as mx

from mm1_mlx.kernels.exponential import LOG2_E, exp2

# Scores of a block: 1 MB of them stay in a core's cache.
BLOCK = 1 << 18
# Fewer rows make the matrix products slow.
MIN_ROWS = 128
# Queries from which on it pays.
FEWEST = 16
# A score below all others; no infinity, so that nothing is ever infinity - infinity.
NEVER = -1e30


def attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None,
) -> mx.array:
    """Attention [B, Hq, T, D] of queries over keys and values [B, Hkv, N, D].

    Args:
        q: queries [B, Hq, T, D].
        k: keys [B, Hkv, N, D].
        v: values likewise.
        scale: what scores are multiplied by.
        mask: None, "causal", or an array that broadcasts to [B, Hq, T, N].
    """
    dtype = q.dtype
    q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    B, Hq, T, D = q.shape
    Hkv, N = k.shape[1:3]
    G = Hq // Hkv
    # Powers of two: the base is in the scale.
    q = (q * (scale * LOG2_E)).reshape(B * Hkv, G, T, D)
    k = k.reshape(B * Hkv, N, D).swapaxes(-1, -2)
    # A column of ones beside the values sums the weights.
    ones = mx.ones((B * Hkv, N, 1))
    v = mx.concatenate([v.reshape(B * Hkv, N, -1), ones], axis=-1)
    if isinstance(mask, mx.array):
        mask = mx.broadcast_to(mask, (B, Hq, T, N)).reshape(B * Hkv, G, T, N)
    rows = min(T, max(MIN_ROWS // G, BLOCK // (B * Hq * N), 1))
    heads = max(1, min(B * Hkv, BLOCK // (G * rows * N)))
    columns = []
    for head in range(0, B * Hkv, heads):
        some = slice(head, head + heads)
        blocks = []
        for row in range(0, T, rows):
            block = slice(row, min(row + rows, T))
            end = N - T + block.stop if mask == "causal" else N
            blocks.append(
                _block(
                    q[some, :, block],
                    k[some, :, :end],
                    v[some, :end],
                    mask[some, :, block] if isinstance(mask, mx.array) else mask,
                )
            )
        columns.append(_joined(blocks, axis=2))
    return _joined(columns, axis=0).reshape(B, Hq, T, -1).astype(dtype)


def _block(
    q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None
) -> mx.array:
    """Attention [H, G, T, D] of queries [H, G, T, D]; keys [H, D, N], values [H, N, D + 1].

    Where it is causal, the last T keys are the queries' own.
    """
    H, G, T, D = q.shape
    N = k.shape[2]
    scores = (q.reshape(H, G * T, D) @ k).reshape(H, G, T, N)
    if isinstance(mask, mx.array):
        if mask.dtype == mx.bool_:
            # A sum is faster than a choice.
            mask = mx.logical_not(mask) * NEVER
        scores = mx.maximum(scores + mask * LOG2_E, 2 * NEVER)
    elif mask == "causal":
        hidden = mx.arange(N) > mx.arange(N - T, N)[:, None]
        scores = scores + hidden * NEVER
    largest = mx.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = exp2(scores - largest)
    sums = (weights.reshape(H, G * T, N) @ v).reshape(H, G, T, -1)
    return sums[..., :-1] / sums[..., -1:]


def _joined(parts: list[mx.array], axis: int) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)
