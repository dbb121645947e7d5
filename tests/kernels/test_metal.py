"""The Metal kernels' text: numbers against float64, bytes against theory."""

import itertools

import mlx.core as mx
import pytest
from attention_cases import CASES, COMPILED, VALUES, Case
from attention_runs import make_run, numbers
from metal_cpu import CPUFactory

from mm1_mlx.kernels import metal

F16, F32 = mx.float16, mx.float32

# Loops that turn several times for each simdgroup, and rows that fill no threadgroup.
LOOPS = [
    Case(packing=(8, 64), dtype=F16, D=128, G=2, T=2, keys=601, chunk=256),
    Case(packing=(4, 64), dtype=F32, D=64, G=2, T=2, keys=601, chunk=256),
    Case(packing=(0, 0), dtype=F16, D=128, G=2, T=2, keys=601, chunk=256),
    Case(packing=(8, 64), dtype=F32, D=128, G=3, T=1, keys=65),
]
each_case = pytest.mark.parametrize("case", [*CASES, *LOOPS], ids=str)


def test_every_kernel_and_every_pair_of_values_is_a_case():
    compiled = {(case.packing, case.dtype, case.D) for case in CASES}
    assert compiled == {
        (packing, dtype, D)
        for packing, dtype, D in itertools.product(*COMPILED.values())
        if packing[1] <= D
    }
    for a, b in itertools.combinations(VALUES, 2):
        possible = set(itertools.product(VALUES[a], VALUES[b]))
        if (a, b) == ("packing", "D"):
            # mlx packs no groups that are longer than a head.
            possible -= {((4, 128), 64), ((8, 128), 64)}
        assert {(getattr(case, a), getattr(case, b)) for case in CASES} == possible
    rows = {
        (
            case.packing[0],
            metal.geometry(1, case.num_kv_heads, case.G * case.T, case.keys)[0],
        )
        for case in CASES
    }
    assert rows == set(itertools.product(metal.BITS, (1, 2, 4, 8)))
    assert set(COMPILED["D"]) == set(metal.HEAD_DIMS)
    assert {bits for bits, _ in COMPILED["packing"]} == set(metal.BITS)
    assert {group for _, group in COMPILED["packing"]} == {0, *metal.GROUP_SIZES}
    assert set(COMPILED["dtype"]) == set(metal.DTYPES)
    assert max(VALUES["T"]) == metal.MAX_QUERIES


@each_case
def test_numbers(case, factory, assert_rounded_once):
    assert_rounded_once(*case.attend(factory))


@pytest.mark.metal
@pytest.mark.usefixtures("gpu")
@each_case
def test_metal_compiles_and_runs_them(case):
    out, expected = case.attend(mx.fast.metal_kernel)
    mx.eval(out)
    assert (out.shape, out.dtype) == (expected.shape, case.dtype)


@pytest.mark.slow
@each_case
def test_each_byte_of_keys_and_values_in_use_is_read_and_no_other(case, cpu_factory):
    cpu_factory.orders = (0,)
    case.attend(cpu_factory)
    *partials, _ = cpu_factory.calls
    # The prefix once for the batch.
    used = [case.prefix] if case.prefix else []
    used.append(sum(case.keys - first for first in case.firsts or [0]))
    side, scales = case.side_bytes
    for (_, counts), keys in zip(partials, used, strict=True):
        touched = {name: held["touched"] for name, held in counts["buffers"].items()}
        assert touched["k"] == touched["values"] == keys * case.num_kv_heads * side
        # Plain keys and values stand in the scales' places too, and are not read there.
        packed = [touched[name] for name in ("ks", "kb", "vs", "vb")]
        assert packed == [keys * case.num_kv_heads * scales] * 4
        assert counts["threadgroup_memory"] <= 32768


@pytest.mark.slow
def test_tiles_of_rows_share_what_they_read(cpu_factory):
    cpu_factory.orders = (0,)
    Case(packing=(4, 64), dtype=F16, D=128, G=16, T=1, keys=70).attend(cpu_factory)
    held = cpu_factory.calls[0][1]["buffers"]["k"]
    assert held["touched_per_threadgroup"] == 2 * held["touched"]


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_factory")
def test_noise_of_fast_math_stays_small(assert_close):
    # 64 ulp in every exp, some 15 times what Metal promises.
    assert_close(*LOOPS[3].attend(CPUFactory(orders=(0,), noise=16)), "model")


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


@pytest.mark.parametrize("D", [64, 80, 96, 128])
@pytest.mark.parametrize("bits", [0, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_what_mlx_packs_and_the_kernels_read(D, bits, group):
    q = numbers((1, 4, 1, D), F16, 0)
    if bits and D % group:
        with pytest.raises(ValueError, match="divisible by the quantization group"):
            make_run(1, 2, 9, D, bits=bits, group=group)
        return
    run = make_run(1, 2, 9, D, bits=bits, group=group if bits else 0)
    # Of what mlx packs, heads of 96 and 2, 3, 5 and 6 bits are left to plain
    # operations, and heads of 80 and 96 behind a shared prefix.
    assert metal.fits(q, run, None) == (D in (64, 128) and bits in (0, 4, 8))


def test_the_text_is_ascii_and_names_no_signature_by_accident():
    for name in (metal.PARTIAL, metal.MERGE):
        text = metal.source(name)
        assert text.isascii()
        # mlx adds parameters for these, also where they stand in a comment.
        assert not any(f"{x}{y}" in text for x in metal.INPUTS for y in SUFFIXES)


SUFFIXES = ("_shape", "_strides", "_ndim")
