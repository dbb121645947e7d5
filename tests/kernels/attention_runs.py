"""Random keys and values, and attention over them in float64."""

import mlx.core as mx
import numpy as np

from mm1_mlx.kernels.run import Run


def numbers(shape, dtype, seed):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def make_run(
    B,
    H,
    length,
    D,
    *,
    dtype=mx.float16,
    bits=0,
    group=0,
    room=None,
    starts=None,
    seed=1,
):
    """A random run whose unused places hold numbers that would show."""
    sides = []
    for i in range(2):
        x = numbers((B, H, room or length, D), dtype, seed + i)
        x[:, :, length:] = 1000
        sides.append(mx.quantize(x, group, bits) if bits else x)
    first = None if starts is None else mx.array(starts)
    return Run(*(tuple(s) if bits else s for s in sides), length, first, bits, group)


def exact(q, runs, scale, causal):
    """Attention [B, Hq, T, D] in float64, row by row; 0 where no key is visible."""

    def plain(run, side):
        return np.array(run.unpacked(side, mx.float32)).astype(np.float64)

    B, Hq, T, D = q.shape
    G = Hq // runs[0].num_kv_heads
    q = np.array(q.astype(mx.float32)).astype(np.float64)
    sides = [(plain(run, run.keys), plain(run, run.values)) for run in runs]
    out = np.zeros((B, Hq, T, D))
    for b, h, t in np.ndindex(B, Hq, T):
        keys, values = [], []
        for run, (k, v) in zip(runs, sides, strict=True):
            row = b if run.rows == B else 0
            first = 0 if run.starts is None else run.starts[b].item()
            last = run.length - T + t + 1 if causal and run is runs[-1] else run.length
            keys.append(k[row, h // G, first : max(first, last)])
            values.append(v[row, h // G, first : max(first, last)])
        keys, values = np.concatenate(keys), np.concatenate(values)
        if len(keys):
            scores = keys @ q[b, h, t] * scale
            weights = np.exp(scores - scores.max())
            out[b, h, t] = weights @ values / weights.sum()
    return out
