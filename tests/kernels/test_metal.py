"""The Metal kernels' text: numbers against float64, bytes against theory."""

import mlx.core as mx
import pytest
from attention_runs import KINDS, exact, make_run, numbers
from metal_cpu import CPUFactory

from mm1_mlx.kernels import metal

F16, BF16, F32 = mx.float16, mx.bfloat16, mx.float32

# B, Hq, Hkv, T, keys, room, D, bits, group, dtype, starts, keys of a block
CASES = {
    "8 bits": (1, 4, 1, 1, 77, 96, 128, 8, 64, F16, None, None),
    "4 bits": (1, 4, 1, 1, 77, 96, 128, 4, 64, F16, None, None),
    "bfloat16, groups of 32": (1, 8, 2, 1, 300, 320, 128, 4, 32, BF16, None, None),
    "two tiles of rows": (1, 16, 1, 1, 70, 96, 128, 4, 64, F16, None, None),
    "three heads a group": (1, 3, 1, 1, 65, 96, 128, 8, 64, F32, None, None),
    "heads of 64": (1, 2, 2, 1, 40, 64, 64, 8, 64, F16, None, None),
    "heads of 64, 4 bits": (1, 2, 1, 1, 33, 64, 64, 4, 32, F32, None, None),
    "four queries": (1, 4, 2, 4, 33, 64, 128, 8, 128, F16, None, None),
    "eight queries, 4 bits": (1, 2, 2, 8, 41, 41, 128, 4, 128, F16, None, None),
    "ragged": (2, 8, 2, 2, 200, 256, 128, 8, 128, F16, [0, 163], None),
    "one key and none": (3, 2, 1, 1, 150, 160, 64, 4, 32, F32, [149, 0, 150], None),
    "one key in all": (1, 2, 1, 1, 1, 8, 64, 8, 64, F16, None, None),
    "loops, 8 bits": (1, 4, 2, 2, 601, 640, 128, 8, 64, F16, None, 256),
    "loops, 4 bits": (2, 4, 2, 2, 601, 640, 64, 4, 64, F32, [0, 300], 256),
    "plain": (1, 4, 2, 1, 77, 96, 128, 0, 0, F16, None, None),
    "plain bfloat16": (1, 2, 1, 8, 33, 64, 64, 0, 0, BF16, None, None),
    "plain float32": (2, 4, 4, 2, 50, 51, 64, 0, 0, F32, [49, 3], None),
    "plain, loops": (2, 4, 2, 2, 601, 640, 128, 0, 0, F16, [0, 300], 256),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def attend(case, factory):
    """The kernels' attention, float64's, and the run."""
    B, Hq, Hkv, T, keys, room, D, bits, group, dtype, starts, chunk = case
    run = make_run(
        B, Hkv, keys, D, dtype=dtype, bits=bits, group=group, room=room, starts=starts
    )
    q = numbers((B, Hq, T, D), dtype, 0)
    scale = D**-0.5
    state = metal.partial(
        q, run, scale=scale, causal=True, factory=factory, chunk=chunk
    )
    out = metal.merge([state], q, factory=factory)
    return out, exact(q, [run], scale, causal=True), run


def largest_difference(out, expected):
    return abs(out.astype(F32) - mx.array(expected.astype("float32"))).max().item()


@each_case
def test_numbers(case, factory, assert_close):
    out, expected, _ = attend(case, factory)
    assert_close(out, expected, KINDS[case[9]])


@pytest.mark.slow
@each_case
def test_each_byte_of_keys_and_values_in_use_is_read_and_no_other(case, cpu_factory):
    B, _, Hkv, _, keys, _, D, bits, group, dtype, starts, _ = case
    cpu_factory.orders = (0,)
    attend(case, cpu_factory)
    (_, counts), _ = cpu_factory.calls
    touched = {name: held["touched"] for name, held in counts["buffers"].items()}
    used = sum(keys - first for first in starts or [0] * B) * Hkv
    side = D * bits // 8 if bits else D * dtype.size
    groups = D // group * dtype.size if bits else 0
    assert touched["k"] == touched["values"] == used * side
    scales = [touched[name] for name in ("ks", "kb", "vs", "vb")]
    # Plain keys and values stand in the scales' places too, and are not read there.
    assert scales == [used * groups] * 4
    assert counts["threadgroup_memory"] <= 32768


@pytest.mark.slow
def test_tiles_of_rows_share_what_they_read(cpu_factory):
    cpu_factory.orders = (0,)
    attend(CASES["two tiles of rows"], cpu_factory)
    held = cpu_factory.calls[0][1]["buffers"]["k"]
    assert held["touched_per_threadgroup"] == 2 * held["touched"]


# B, Hq, Hkv, T, prefix, suffix, D, bits, group, dtype, starts
CASCADES = {
    "8 bits": (3, 8, 2, 1, 130, 40, 128, 8, 64, F16, [0, 29, 39]),
    "plain": (3, 4, 2, 1, 130, 40, 64, 0, 0, F32, [0, 29, 39]),
    "plain, queries": (2, 4, 2, 3, 300, 9, 64, 0, 0, F16, [0, 4]),
    "4 bits, queries": (2, 2, 1, 2, 70, 5, 128, 4, 32, BF16, None),
}
each_cascade = pytest.mark.parametrize("case", CASCADES.values(), ids=CASCADES)


def cascade(case, factory):
    B, Hq, Hkv, T, P, S, D, bits, group, dtype, starts = case
    kind = {"dtype": dtype, "bits": bits, "group": group}
    runs = [
        make_run(1, Hkv, P, D, room=P + 3, **kind),
        make_run(B, Hkv, S, D, room=S + 3, starts=starts, seed=5, **kind),
    ]
    q = numbers((B, Hq, T, D), dtype, 0)
    scale = D**-0.5
    states = [
        metal.partial(q, run, scale=scale, causal=run is runs[1], factory=factory)
        for run in runs
    ]
    out = metal.merge(states, q, factory=factory)
    return out, exact(q, runs, scale, causal=True), runs


@each_cascade
def test_a_shared_prefix_and_suffixes_merge(case, factory, assert_close):
    out, expected, _ = cascade(case, factory)
    assert_close(out, expected, KINDS[case[9]])


@pytest.mark.slow
def test_a_shared_prefix_is_touched_once_for_the_batch(cpu_factory):
    case = CASCADES["8 bits"]
    cpu_factory.orders = (0,)
    cascade(case, cpu_factory)
    held = cpu_factory.calls[0][1]["buffers"]["k"]
    assert held["touched"] == 2 * 130 * 128


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_factory")
def test_noise_of_fast_math_stays_small(assert_close):
    # 64 ulp in every exp, some 15 times what Metal promises.
    factory = CPUFactory(orders=(0,), noise=16)
    out, expected, _ = attend(CASES["three heads a group"], factory)
    assert_close(out, expected, "model")


def test_geometry_fills_a_gpu_and_covers_all_keys():
    for B, H, rows, length in [(1, 8, 4, 4096), (8, 8, 4, 600), (1, 1, 1, 1)]:
        R, chunk, blocks = metal.geometry(B, H, rows, length)
        assert R in (1, 2, 4, 8)
        assert chunk % (32 * metal.SIMDGROUPS) == 0
        assert (blocks - 1) * chunk < length <= blocks * chunk
        assert blocks <= metal.MAX_BLOCKS
    assert metal.geometry(1, 8, 4, 4096) == (4, 256, 16)
    assert metal.geometry(1, 8, 64, 4096)[0] == metal.MAX_ROWS


def test_what_the_kernels_do_not_cover():
    q = numbers((1, 4, 1, 128), F16, 0)
    good = make_run(1, 2, 9, 128, bits=8, group=64)
    assert metal.fits(q, good, None)
    assert metal.fits(q, good, "causal")
    assert metal.fits(q, make_run(1, 2, 9, 128), None)
    assert not metal.fits(q, good, mx.ones((1, 9)) > 0)
    assert not metal.fits(numbers((1, 4, 9, 128), F16, 0), good, "causal")
    assert not metal.fits(q.astype(F32), good, None)
    assert not metal.fits(q, make_run(1, 2, 9, 128, bits=6, group=64), None)
    narrow = make_run(1, 2, 9, 96, bits=8, group=32)
    assert not metal.fits(numbers((1, 4, 1, 96), F16, 0), narrow, None)


def test_the_text_is_ascii_and_names_no_signature_by_accident():
    for name in (metal.PARTIAL, metal.MERGE):
        text = metal.source(name)
        assert text.isascii()
        # mlx adds parameters for these, also where they stand in a comment.
        assert not any(f"{x}{y}" in text for x in metal.INPUTS for y in SUFFIXES)


SUFFIXES = ("_shape", "_strides", "_ndim")
