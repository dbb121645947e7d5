"""Attention by blocks and its quick exponentials equal float64, and do no more work."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mm1_mlx.kernels import blocked
from mm1_mlx.kernels.exponential import erf, exp2


def random(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def exact(q, k, v, scale, mask):
    """In float64: one head after the other."""
    q, k, v = (np.array(x.astype(mx.float32), np.float64) for x in (q, k, v))
    B, Hq, T, _ = q.shape
    Hkv, N = k.shape[1:3]
    out = np.zeros((B, Hq, T, v.shape[-1]))
    allowed = np.ones((B, Hq, T, N), bool)
    added = np.zeros((B, Hq, T, N))
    if isinstance(mask, str):
        allowed &= np.arange(N) <= np.arange(N - T, N)[:, None]
    elif mask is not None and mask.dtype == mx.bool_:
        allowed &= np.broadcast_to(np.array(mask), allowed.shape)
    elif mask is not None:
        added += np.broadcast_to(np.array(mask), added.shape)
    for b in range(B):
        for h in range(Hq):
            scores = q[b, h] @ k[b, h * Hkv // Hq].T * scale + added[b, h]
            scores = np.where(allowed[b, h], scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[b, h] = weights @ v[b, h * Hkv // Hq]
            out[b, h] /= weights.sum(axis=-1, keepdims=True)
    return out


SHAPES = [
    # B, Hq, Hkv, T, N, D
    (1, 4, 4, 70, 70, 16),
    (2, 4, 2, 33, 65, 8),
    (1, 6, 1, 17, 200, 32),
    (3, 2, 2, 16, 16, 64),
    (1, 1, 1, 1, 5, 4),
]


@pytest.fixture(params=[100, 3000, 1 << 19], ids=["tiny", "small", "whole"])
def block(request, monkeypatch):
    """Blocks of so few scores that every loop turns several times, or of all."""
    monkeypatch.setattr(blocked, "BLOCK", request.param)
    monkeypatch.setattr(blocked, "MIN_ROWS", min(16, request.param // 100))
    return request.param


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [None, "causal", "bool", "additive", "per head"])
def test_attention_equals_float64(shape, kind, tolerances):
    B, Hq, Hkv, T, N, D = shape
    q, k, v = random(B, Hq, T, D), random(B, Hkv, N, D, seed=1), random(B, Hkv, N, D)
    mask = kind
    if kind == "bool":
        mask = random(B, 1, T, N, seed=3) > 0
        mask[..., 0] = True
    elif kind == "additive":
        mask = 3 * random(T, N, seed=4)
    elif kind == "per head":
        mask = random(1, Hq, T, N, seed=5)
    out = blocked.attend(q, k, v, scale=D**-0.5, mask=mask)
    expected = exact(q, k, v, D**-0.5, mask)
    assert np.abs(np.array(out) - expected).max() < tolerances["op"]


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [None, "causal", "bool", "additive"])
def test_gradients_equal_those_of_mlx(shape, kind, tolerances):
    B, Hq, Hkv, T, N, D = shape
    q, k, v = random(B, Hq, T, D), random(B, Hkv, N, D, seed=1), random(B, Hkv, N, D)
    weights = random(B, Hq, T, D, seed=7)
    mask = kind
    if kind == "bool":
        mask = random(B, 1, T, N, seed=3) > 0
        mask[..., 0] = True
    elif kind == "additive":
        mask = 3 * random(T, N, seed=4)

    def loss(attention):
        return lambda *x: (attention(*x, scale=0.25, mask=mask) * weights).sum()

    ours = mx.grad(loss(blocked.attend), (0, 1, 2))(q, k, v)
    mlx = mx.grad(loss(mx.fast.scaled_dot_product_attention), (0, 1, 2))(q, k, v)
    for one, other in zip(ours, mlx, strict=True):
        # Of a single key nothing reaches queries and keys.
        largest = mx.maximum(mx.abs(other).max(), 1e-2)
        assert mx.abs(one - other).max() < tolerances["op"] * largest


def test_gradients_keep_no_scores():
    T, heads = 512, 4
    x = random(1, heads, T, 16)
    mx.eval(x)

    def peak(layers):
        def loss(x):
            for _ in range(layers):
                x = blocked.attend(x, x, x, scale=0.25, mask="causal")
            return x.sum()

        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.grad(loss)(x))
        return mx.get_peak_memory() - before

    scores = heads * T * T * 4
    # A layer more keeps its inputs and results, a quarter of its scores here.
    assert (peak(12) - peak(4)) / 8 < scores / 2


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_comes_back_as_it_came(dtype, tolerances):
    q, k, v = (random(1, 2, 20, 16, seed=i).astype(dtype) for i in range(3))
    out = blocked.attend(q, k, v, scale=0.25, mask="causal")
    assert out.dtype == dtype
    expected = exact(q, k, v, 0.25, "causal")
    tolerance = tolerances[str(dtype).removeprefix("mlx.core.")]
    assert np.abs(np.array(out.astype(mx.float32)) - expected).max() < tolerance


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_scores_far_apart_do_no_harm(size):
    q, k, v = (
        size * random(1, 1, 20, 8),
        random(1, 1, 20, 8, seed=1),
        random(1, 1, 20, 8),
    )
    out = blocked.attend(q, k, v, scale=1.0, mask="causal")
    assert mx.isfinite(out).all()
    expected = exact(q, k, v, 1.0, "causal")
    assert np.abs(np.array(out) - expected).max() < 1e-3


def test_a_row_that_sees_nothing_is_finite():
    q, k, v = random(1, 1, 20, 8), random(1, 1, 20, 8), random(1, 1, 20, 8)
    mask = mx.zeros((20, 20), mx.bool_)
    assert mx.isfinite(blocked.attend(q, k, v, scale=1.0, mask=mask)).all()


def test_keys_that_a_causal_mask_hides_are_left_out(monkeypatch):
    counted = []
    monkeypatch.setattr(blocked, "exp2", lambda x: counted.append(x.size) or exp2(x))
    monkeypatch.setattr(blocked, "BLOCK", 64 * 512 * 2)
    monkeypatch.setattr(blocked, "MIN_ROWS", 64)
    x = random(1, 2, 512, 16)
    blocked.attend(x, x, x, scale=1.0, mask="causal")
    # Blocks of 64 rows: all before them, and those of the block itself whole.
    assert sum(counted) == 2 * sum(64 * 64 * (i + 1) for i in range(8))
    assert sum(counted) < 0.57 * 2 * 512**2


def test_powers_of_two_equal_float64():
    x = np.concatenate(
        [
            np.linspace(-126, 127, 100_001),
            np.arange(-126, 128),
            np.arange(-60, 60) + 0.5,
        ]
    ).astype(np.float32)
    result = np.array(exp2(mx.array(x)), np.float64)
    assert np.abs(result / np.exp2(x.astype(np.float64)) - 1).max() < 3e-7
    whole = x == np.round(x)
    assert np.array_equal(result[whole], np.exp2(x[whole].astype(np.float64)))


def test_powers_too_small_are_zero():
    x = mx.array([-127.0, -1e4, -1e30, -math.inf])
    assert exp2(x).tolist() == [0.0] * 4


def test_gradients_of_padding_are_zero_and_never_subnormal():
    """Products with subnormal numbers take a CPU ten times as long."""
    x = random(4, 2, 40, 16)
    wanted = mx.arange(40)[None, None, :, None] < 20
    grad = mx.grad(
        lambda x: (blocked.attend(x, x, x, scale=0.25, mask="causal") * wanted).sum()
    )
    found = np.abs(np.array(grad(x)))
    assert (found[:, :, 20:] == 0).all()
    assert not ((found > 0) & (found < np.finfo(np.float32).tiny)).any()


def test_the_error_function_equals_float64():
    x = np.linspace(-6, 6, 20_001).astype(np.float32)
    expected = np.array([math.erf(value) for value in x])
    assert np.abs(np.array(erf(mx.array(x))) - expected).max() < 6e-7
    assert erf(mx.array([0.0, 50.0, -50.0])).tolist() == [0, 1, -1]
