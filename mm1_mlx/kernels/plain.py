"""Attention in plain operations: the definition that every kernel is checked against.

A ``State`` is attention over some of the keys, not yet divided: states over disjoint
keys merge into attention over all of them, exactly,

    o = sum_j exp(s_j - m) v_j    l = sum_j exp(s_j - m)    m = max_j s_j.

Everything is computed in float32. Source: the merge of FlashAttention's blocks
(arXiv 2205.14135, section 3.1), for shared prefixes as in Hydragen (arXiv 2402.05099).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from mm1_mlx.kernels.exponential import LOG2_E, exp2
from mm1_mlx.kernels.run import Packed, Run

# A score below all others; no infinity, so that nothing is ever infinity - infinity.
NEVER = -1e30

# mlx's CPU backend multiplies by packed matrices row by row and keys one number at a
# time: unpacked once, BLAS is faster from these many rows on (measured, 1k-4k keys).
CPU_PACKED_KEYS_ROWS = 1
CPU_PACKED_VALUES_ROWS = 8

# Scores computed at once on a CPU, whose passes over them then find them in its cache.
CPU_SCORES = 1 << 20


class State(NamedTuple):
    """Attention over parts of the keys, R = G * T rows a key-value head, P parts."""

    o: mx.array
    """Sums of values weighted by exp(score - m), [B, Hkv, R, P, D]."""
    m: mx.array
    """The largest scores, [B, Hkv, R, P]; NEVER where no key is visible."""
    l: mx.array  # noqa: E741  (the papers' letter)
    """Sums of the weights, [B, Hkv, R, P]; 0 where no key is visible."""


def attend(
    q: mx.array, runs: list[Run], *, scale: float, mask: mx.array | str | None
) -> mx.array:
    """Attention [B, Hq, T, D] of queries over runs, the last of which holds their own.

    Args:
        q: queries [B, Hq, T, D].
        runs: what is attended to, in the order of the mask's positions.
        scale: what scores are multiplied by.
        mask: None, "causal", or an array that broadcasts to [B, Hq, T, N].
    """
    ends = list(itertools.accumulate(run.length for run in runs))
    states = [
        state(q, run, scale=scale, mask=_part(mask, run, end, end == ends[-1]))
        for run, end in zip(runs, ends, strict=True)
    ]
    return merge(states, q)


def _part(
    mask: mx.array | str | None, run: Run, end: int, is_last: bool
) -> mx.array | str | None:
    """What a mask over all positions says of a run; what is past is seen whole."""
    if isinstance(mask, mx.array):
        return mask[..., end - run.length : end]
    return mask if is_last else None


def joint_mask(
    runs: list[Run], T: int, mask: mx.array | str | None
) -> mx.array | str | None:
    """The mask over joined runs that says their padding too, [B, 1, T, N] if any."""
    if all(run.starts is None for run in runs):
        return mask
    B = max(run.rows for run in runs)
    parts = []
    for run in runs:
        seen = visible(run, T, mask if run is runs[-1] else None)
        seen = mx.array(True) if seen is None else seen
        parts.append(mx.broadcast_to(seen, (B, 1, 1, T, run.length)))
    real = mx.concatenate(parts, axis=-1)[:, 0]
    if not isinstance(mask, mx.array):
        return real
    if mask.dtype == mx.bool_:
        return mask & real
    return mx.where(real, mask, mx.finfo(mask.dtype).min)


def state(q: mx.array, run: Run, *, scale: float, mask: mx.array | str | None) -> State:
    """The state, of one part, of queries [B, Hq, T, D] over a run.

    Args:
        q: the queries; their key-value head's G = Hq / Hkv lie side by side.
        run: what is attended to; its last T positions are the queries' own where
            ``mask`` is "causal".
        scale: what scores are multiplied by.
        mask: None, "causal", or an array that broadcasts to [B, Hq, T, N].
    """
    B, Hq, T, D = q.shape
    H = run.num_kv_heads
    seen = visible(run, T, mask)
    all_count = seen is None and not isinstance(mask, mx.array)

    def hide(scores: mx.array) -> mx.array:
        scores = _unfold(scores, run, B).reshape(B, H, Hq // H, T, run.length)
        scores = _masked(scores, seen, mask)
        return _fold(scores.reshape(B, H, -1, run.length), run)

    x = q.astype(mx.float32).reshape(B, H, -1, D) * scale
    parts = _over_rows(_fold(x, run), run, None if all_count else hide)
    return State(*(_unfold(part, run, B)[:, :, :, None] for part in parts))


def _over_rows(
    x: mx.array, run: Run, hide: Callable[[mx.array], mx.array] | None
) -> tuple[mx.array, mx.array, mx.array]:
    """A state's o, m and l, without its parts, of rows [B, Hkv, R, D]."""
    B, H, R, _ = x.shape
    by_keys, by_values = _by_keys(run, R), _by_values(run, R)
    most = R if hide or not on_cpu() else max(1, CPU_SCORES // (B * H * run.length))
    parts = []
    for start in range(0, R, most):
        scores = by_keys(x[:, :, start : start + most])
        scores = hide(scores) if hide else scores
        m = mx.maximum(scores.max(axis=-1, keepdims=True), NEVER)
        weights = _exp(scores - m)
        weights = mx.where(scores > NEVER, weights, 0) if hide else weights
        parts.append((by_values(weights), m[..., 0], weights.sum(axis=-1)))
    o, m, l = (  # noqa: E741
        mx.concatenate(list(rows), axis=2) if len(parts) > 1 else rows[0]
        for rows in zip(*parts, strict=True)
    )
    return o, m, l


def merge(states: list[State], like: mx.array) -> mx.array:
    """Attention in the shape [B, Hq, T, D] and precision of ``like``; 0 without keys."""
    o, m, l = joined(states)  # noqa: E741
    weights = _exp(m - m.max(axis=-1, keepdims=True))
    total = (weights * l).sum(axis=-1)[..., None]
    o = (weights[..., None] * o).sum(axis=-2)
    # A row without keys has o = 0, and 0 / 1 is what it attends to.
    return (o / mx.where(total > 0, total, 1)).reshape(like.shape).astype(like.dtype)


def joined(states: list[State]) -> State:
    """All parts of states as one state's."""
    if len(states) == 1:
        return states[0]
    columns = zip(*states, strict=True)
    return State(*(mx.concatenate(list(parts), axis=3) for parts in columns))


def visible(run: Run, T: int, mask: mx.array | str | None) -> mx.array | None:
    """Which positions count, a bool that broadcasts to [B, Hkv, G, T, N]; None: all."""
    places = mx.arange(run.length)
    seen = None
    if run.starts is not None:
        seen = places >= run.starts[:, None, None, None, None]
    if isinstance(mask, str) and T > 1:
        causal = places <= mx.arange(run.length - T, run.length)[:, None]
        seen = causal if seen is None else seen & causal
    return seen


def _masked(
    scores: mx.array, seen: mx.array | None, mask: mx.array | str | None
) -> mx.array:
    """Scores [B, Hkv, G, T, N], NEVER where they do not count."""
    if isinstance(mask, mx.array):
        if mask.ndim == 4:
            # The heads' axis is the key-value heads' and their groups'.
            heads = scores.shape[1:3] if mask.shape[1] > 1 else (1, 1)
            mask = mask.reshape(mask.shape[0], *heads, *mask.shape[2:])
        if mask.dtype == mx.bool_:
            scores = mx.where(mask, scores, NEVER)
        else:
            scores = mx.maximum(scores + mask, NEVER)
    return scores if seen is None else mx.where(seen, scores, NEVER)


def _fold(x: mx.array, run: Run) -> mx.array:
    """Rows [B, Hkv, R, ...]; all the batch's as one where it shares the run."""
    if run.rows == x.shape[0]:
        return x
    B, H, R, *rest = x.shape
    return x.swapaxes(0, 1).reshape(1, H, B * R, *rest)


def _unfold(x: mx.array, run: Run, B: int) -> mx.array:
    """What ``_fold`` was given."""
    if run.rows == B:
        return x
    _, H, R, *rest = x.shape
    return x.reshape(H, B, R // B, *rest).swapaxes(0, 1)


def _by_keys(run: Run, rows: int) -> Callable[[mx.array], mx.array]:
    """Scores [B, Hkv, R, N] of rows [B, Hkv, R, D], of which there are so many."""
    if run.bits and _stays_packed(rows, CPU_PACKED_KEYS_ROWS):
        return lambda x: _packed_product(x, run.used(run.keys), run, transpose=True)
    keys = run.unpacked(run.keys, mx.float32).swapaxes(-1, -2)
    return lambda x: x @ keys


def _by_values(run: Run, rows: int) -> Callable[[mx.array], mx.array]:
    """Sums [B, Hkv, R, D] of the values, weighted [B, Hkv, R, N]."""
    if run.bits and _stays_packed(rows, CPU_PACKED_VALUES_ROWS):
        return lambda x: _packed_product(x, run.used(run.values), run, transpose=False)
    values = run.unpacked(run.values, mx.float32)
    return lambda x: x @ values


def _exp(x: mx.array) -> mx.array:
    """The exponential of float32 numbers, none above 0."""
    return exp2(x * LOG2_E) if on_cpu() else mx.exp(x)


def _stays_packed(rows: int, most: int) -> bool:
    return not on_cpu() or rows <= most


def on_cpu() -> bool:
    """Whether arrays are computed on a CPU."""
    return bool(mx.default_device() == mx.cpu)


def _packed_product(
    x: mx.array, side: mx.array | Packed, run: Run, *, transpose: bool
) -> mx.array:
    codes, scales, biases = side
    return mx.quantized_matmul(
        x,
        codes,
        scales.astype(mx.float32),
        biases.astype(mx.float32),
        transpose=transpose,
        group_size=run.group_size,
        bits=run.bits,
    )
