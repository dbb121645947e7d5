"""mlx's own attention: over plain keys, and over runs that are first made plain."""

from __future__ import annotations

import mlx.core as mx

from mm1_mlx.kernels import blocked, plain
from mm1_mlx.kernels.run import Run
from mm1_mlx.kernels.tracing import on_cpu


def attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None,
) -> mx.array:
    """Attention [B, Hq, T, D] of queries over keys and values [B, Hkv, N, D].

    On a CPU, where nothing is fused, ``blocked.py`` stands for it from a few queries on.
    """
    if on_cpu() and q.shape[2] >= blocked.FEWEST:
        return blocked.attend(q, k, v, scale=scale, mask=mask)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def attend_joined(
    q: mx.array, runs: list[Run], *, scale: float, mask: mx.array | str | None
) -> mx.array:
    """Attention over runs as one array of plain keys; many queries pay for the copy."""
    B, _, T, _ = q.shape
    k, v = (
        mx.concatenate([mx.broadcast_to(x, (B, *x.shape[1:])) for x in parts], axis=2)
        for parts in (
            [run.unpacked(run.keys, q.dtype) for run in runs],
            [run.unpacked(run.values, q.dtype) for run in runs],
        )
    )
    return attend(q, k, v, scale=scale, mask=plain.joint_mask(runs, T, mask))
