"""The definition in plain operations, against float64."""

import mlx.core as mx
import pytest
from attention_runs import exact, make_run, numbers

from mm1_mlx.kernels import fused, plain

F32 = mx.float32


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def device(request, monkeypatch):
    """Which products stay packed; both compute the same, here on the CPU."""
    monkeypatch.setattr(plain, "on_cpu", lambda: request.param == "as on a CPU")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("bits", [0, 2, 4, 6, 8])
@pytest.mark.parametrize("T", [1, 3, 9])
@pytest.mark.parametrize("starts", [None, [0, 31]])
def test_attention_of_one_run(bits, T, starts, assert_close):
    run = make_run(2, 2, 40, 32, dtype=F32, bits=bits, group=32, room=48, starts=starts)
    q = numbers((2, 6, T, 32), F32, 0)
    for mask in (None, "causal"):
        out = plain.attend(q, [run], scale=0.2, mask=mask)
        assert_close(out, exact(q, [run], 0.2, mask == "causal"), "op")


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, F32])
def test_half_precision_is_rounded_once(dtype, assert_rounded_once):
    run = make_run(1, 2, 300, 64, dtype=dtype, bits=8, group=64)
    q = numbers((1, 4, 1, 64), dtype, 0)
    out = plain.attend(q, [run], scale=0.125, mask=None)
    assert out.dtype == dtype
    assert_rounded_once(out, exact(q, [run], 0.125, causal=False))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("T", [1, 4])
def test_a_shared_run_and_own_ones(bits, T, assert_close):
    kind = {"dtype": F32, "bits": bits, "group": 32}
    runs = [
        make_run(1, 2, 50, 32, room=60, **kind),
        make_run(3, 2, 20, 32, room=30, starts=[0, 7, 16], seed=5, **kind),
    ]
    q = numbers((3, 4, T, 32), F32, 0)
    expected = exact(q, runs, 0.2, causal=True)
    out = plain.attend(q, runs, scale=0.2, mask="causal")
    assert_close(out, expected, "op")
    joined = fused.attend_joined(q, runs, scale=0.2, mask="causal")
    assert_close(joined, expected, "op")


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("kind", ["bool", "numbers"])
def test_masks_of_a_callers_own(heads, kind, assert_close):
    kinds = {"dtype": F32, "bits": 8, "group": 32}
    runs = [
        make_run(1, 2, 30, 32, **kinds),
        make_run(2, 2, 10, 32, starts=[0, 4], seed=5, **kinds),
    ]
    q = numbers((2, 4, 3, 32), F32, 0)
    mask = numbers((2, heads, 3, 40), F32, 9)
    if kind == "bool":
        mask = mask > -0.5
    k, v = (
        mx.concatenate([mx.broadcast_to(x, (2, *x.shape[1:])) for x in side], axis=2)
        for side in (
            [run.unpacked(run.keys, F32) for run in runs],
            [run.unpacked(run.values, F32) for run in runs],
        )
    )
    padding = mx.array([0, 4])[:, None, None, None] > mx.arange(-30, 10)
    padding = padding & (mx.arange(40) >= 30)
    whole = mask if kind == "numbers" else mx.where(mask, 0.0, -1e9)
    expected = mx.fast.scaled_dot_product_attention(
        q, k, v, scale=0.2, mask=mx.where(padding, -1e9, whole)
    )
    for attend in (plain.attend, fused.attend_joined):
        assert_close(attend(q, runs, scale=0.2, mask=mask), expected, "op")


def test_a_row_without_keys_is_zero_and_no_nan():
    run = make_run(2, 1, 9, 32, dtype=F32, starts=[9, 0])
    out = plain.attend(numbers((2, 1, 1, 32), F32, 0), [run], scale=1, mask=None)
    assert mx.abs(out[0]).max().item() == 0
    assert mx.abs(out[1]).max().item() > 0


def test_scores_of_any_size_do_not_overflow():
    run = make_run(1, 1, 9, 32, dtype=F32)
    q = numbers((1, 1, 1, 32), F32, 0) * 1e4
    out = plain.attend(q, [run], scale=1, mask=None)
    assert mx.isfinite(out).all().item()


def test_rows_are_computed_in_pieces_on_a_cpu(monkeypatch, assert_close):
    runs = [
        make_run(1, 2, 50, 32, dtype=F32),
        make_run(3, 2, 20, 32, dtype=F32, starts=[0, 7, 16], seed=5),
    ]
    q = numbers((3, 4, 9, 32), F32, 0)
    seen = []

    def exp(x):
        seen.append(x.shape)
        return mx.exp(x)

    monkeypatch.setattr(plain, "_exp", exp)
    monkeypatch.setattr(plain, "CPU_SCORES", 2 * 50 * 7)
    out = plain.attend(q, runs, scale=0.2, mask="causal")
    assert_close(out, exact(q, runs, 0.2, causal=True), "op")
    # Of 3 sequences' 2 * 9 rows a key-value head, 7 at once.
    assert [shape[2] for shape in seen if shape[-1] == 50] == [7] * 7 + [5]
