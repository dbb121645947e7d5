"""Attention on a CPU, a block of scores at a time: what its caches hold is not waited for.

mlx's CPU backend computes all scores at once, those that a causal mask hides too, and
their exponentials one by one. Here a block's scores, weights and sums are done before
the next one's, hidden keys are left out, and powers of two stand for exponentials.
Gradients compute a block's weights again from the logarithms of their sums, so that
none are kept (FlashAttention, arXiv 2205.14135, algorithm 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

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
        mask: None, "causal", or an array that broadcasts to [B, Hq, T, N]. No gradient
            reaches it.
    """
    dtype = q.dtype
    q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    B, Hq, T, _ = q.shape
    Hkv, N = k.shape[1:3]
    G = Hq // Hkv
    # Powers of two: the base is in the scale.
    q = (q * (scale * LOG2_E)).reshape(B * Hkv, G, T, -1)
    k, v = (x.reshape(B * Hkv, N, -1) for x in (k, v))
    if isinstance(mask, mx.array):
        mask = mx.broadcast_to(mask, (B, Hq, T, N)).reshape(B * Hkv, G, T, N)
        mask = mx.stop_gradient(mask)
    y, _ = _attention(mask)(q, k, v)
    return y.reshape(B, Hq, T, -1).astype(dtype)


def _attention(mask: mx.array | str | None) -> Callable[..., Any]:
    """Sums [H, G, T, D] of values [H, N, D], and the logarithms of the weights' sums.

    Of queries [H, G, T, D] that are scaled already, over keys [H, N, D].
    """

    def forward(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        keys = k.swapaxes(-1, -2)
        # A column of ones beside the values sums the weights.
        values = mx.concatenate([v, mx.ones((*v.shape[:2], 1))], axis=-1)
        columns = []
        for some, blocks in _blocks(q, k.shape[1], mask):
            found = [
                _block(
                    q[some, :, rows], keys[some, :, :end], values[some, :end], hidden
                )
                for rows, end, hidden in blocks
            ]
            columns.append([_joined(list(x), 2) for x in zip(*found, strict=True)])
        y, logs = (_joined(list(x), 0) for x in zip(*columns, strict=True))
        return y, logs

    def backward(
        primals: tuple[mx.array, ...],
        cotangents: tuple[mx.array, ...],
        outputs: tuple[mx.array, ...],
    ) -> tuple[mx.array, ...]:
        (q, k, v), (dy, _), (y, logs) = primals, cotangents, outputs
        # What a change of all weights alike would change.
        common = (dy * y).sum(axis=-1, keepdims=True)
        columns = []
        for some, blocks in _blocks(q, k.shape[1], mask):
            dq: list[mx.array] = []
            dk, dv = mx.zeros_like(k[some]), mx.zeros_like(v[some])
            for rows, end, hidden in blocks:
                at = (some, slice(None), rows)
                parts = _block_gradients(
                    *(q[at], k[some, :end], v[some, :end], hidden),
                    *(logs[at], dy[at], common[at]),
                )
                dq.append(parts[0])
                dk, dv = (
                    whole + _widened(part, k.shape[1])
                    for whole, part in ((dk, parts[1]), (dv, parts[2]))
                )
            columns.append((_joined(dq, 2), dk, dv))
        return tuple(_joined(list(x), 0) for x in zip(*columns, strict=True))

    attention = mx.custom_function(forward)
    attention.vjp(backward)
    return attention


def _blocks(
    q: mx.array, N: int, mask: mx.array | str | None
) -> Iterator[tuple[slice, list[tuple[slice, int, Any]]]]:
    """Heads done together; and of them the rows, how many keys they see, and their mask."""
    H, G, T, _ = q.shape
    size = min(T, max(MIN_ROWS // G, BLOCK // (H * G * N), 1))
    heads = max(1, min(H, BLOCK // (G * size * N)))
    for head in range(0, H, heads):
        some = slice(head, min(head + heads, H))
        blocks = []
        for row in range(0, T, size):
            rows = slice(row, min(row + size, T))
            hidden = mask[some, :, rows] if isinstance(mask, mx.array) else mask
            blocks.append((rows, N - T + rows.stop if mask == "causal" else N, hidden))
        yield some, blocks


def _scores(q: mx.array, k: mx.array, mask: mx.array | str | None) -> mx.array:
    """Scores [H, G, T, N] of queries [H, G, T, D] and keys [H, D, N].

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
    return scores


def _block(
    q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None
) -> tuple[mx.array, mx.array]:
    """Attention [H, G, T, D] of queries [H, G, T, D]; keys [H, D, N], values [H, N, D + 1].

    And the logarithms to base 2 [H, G, T, 1] of what the weights sum up to.
    """
    H, G, T, _ = q.shape
    scores = _scores(q, k, mask)
    largest = scores.max(axis=-1, keepdims=True)
    weights = exp2(scores - largest)
    sums = (weights.reshape(H, G * T, -1) @ v).reshape(H, G, T, -1)
    y, total = sums[..., :-1], sums[..., -1:]
    return y / total, largest + mx.log2(total)


def _block_gradients(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    mask: mx.array | str | None,
    logs: mx.array,
    dy: mx.array,
    common: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of the queries [H, G, T, D], and of the keys and values [H, N, D]."""
    H, G, T, D = q.shape
    weights = exp2(_scores(q, k.swapaxes(-1, -2), mask) - logs)
    rows = dy.reshape(H, G * T, -1)
    dweights = (rows @ v.swapaxes(-1, -2)).reshape(weights.shape)
    dscores = (weights * (dweights - common)).reshape(H, G * T, -1)
    # Scores count in powers of two.
    dq = (dscores @ k).reshape(H, G, T, D) * (1 / LOG2_E)
    dk = dscores.swapaxes(-1, -2) @ q.reshape(H, G * T, D) * (1 / LOG2_E)
    dv = weights.reshape(H, G * T, -1).swapaxes(-1, -2) @ rows
    return dq, dk, dv


def _widened(x: mx.array, length: int) -> mx.array:
    """Gradients [H, N, D] of the first keys, with none of the others."""
    if x.shape[1] == length:
        return x
    return mx.pad(x, [(0, 0), (0, length - x.shape[1]), (0, 0)])


def _joined(parts: list[mx.array], axis: int) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)
