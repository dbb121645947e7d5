"""Queries [B, Hq, T, D] and a cache's keys and values to attention [B, Hq, T, D]."""

from typing import Any

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention


def attend(
    q: mx.array,
    k: Any,
    v: Any,
    *,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
) -> mx.array:
    """The attention [B, Hq, T, D] of q over what a cache holds; no input is changed.

    Args:
        q: queries [B, Hq, T, D].
        k: what ``cache.update_and_fetch`` returned, keys [B, Hkv, N, D] or packed.
        v: the values likewise.
        cache: the layer's cache, None where there is none.
        scale: what scores are multiplied by, D ** -0.5.
        mask: None, "causal", or an array that broadcasts to [B, Hq, T, N].
    """
    if hasattr(cache, "bits"):
        # mlx-lm scales the queries in place.
        q = q + 0
        return scaled_dot_product_attention(
            q, k, v, cache=cache, scale=scale, mask=mask
        )
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
