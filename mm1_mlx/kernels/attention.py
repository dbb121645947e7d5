"""Queries [B, Hq, T, D] and a cache's keys and values to attention [B, Hq, T, D].

What runs, for T queries a sequence:

    plain cache                     mlx's attention, on a CPU ours in blocks (fused.py)
    packed or shared keys
      T <= 8 on a Metal GPU         the kernels (metal.py) over heads of 64 and 128, plain
                                    or of 4 or 8 bits, where they agree with plain.py and
                                    were faster (choice.py)
      T > 8                         made plain and joined, then as above; on a CPU what a
                                    batch shares is not copied: plain.py
      otherwise                     plain.py; on a GPU plain keys are joined
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mm1_mlx.kernels import fused, metal, plain
from mm1_mlx.kernels.choice import Variant, current
from mm1_mlx.kernels.run import Run, runs_of


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
        mask: None, "causal", or an array that broadcasts to [B, Hq, T, N]. What a
            cache of ours says of padding holds besides.
    """
    if not hasattr(cache, "bits") and not hasattr(cache, "runs"):
        return fused.attend(q, k, v, scale=scale, mask=mask)
    runs = [run for run in runs_of(cache) if run.length]
    kernels = current()
    if kernels and all(
        metal.fits(q, run, mask) and kernels.use(Variant.of(q, run)) for run in runs
    ):
        return kernels.attend(q, runs, scale=scale, causal=mask == "causal")
    if _pays_to_join(q, runs):
        return fused.attend_joined(q, runs, scale=scale, mask=mask)
    return plain.attend(q, runs, scale=scale, mask=mask)


def _pays_to_join(q: mx.array, runs: list[Run]) -> bool:
    """Whether mlx's attention over a plain copy of the keys beats plain operations."""
    many = q.shape[2] > metal.MAX_QUERIES
    if plain.on_cpu():
        # There mlx's attention is plain operations too, once more per sequence.
        return many and all(run.rows == q.shape[0] for run in runs)
    return many or not all(run.bits for run in runs)
