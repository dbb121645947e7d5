"""The harness itself: mlx's own attention kernels, unmodified, give the right numbers."""

import re
import struct
import sys
from pathlib import Path

import mlx
import mlx.core as mx
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from metal_cpu import Buffer, from_bytes, run_text, to_bytes
from msl_build import MSLError
from needed import need_cpu_harness

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cpu_harness")]

INCLUDE = Path(next(iter(mlx.__path__))) / "include"
KERNELS = "mlx/backend/metal/kernels"
STEEL = f"{KERNELS}/steel/attn/kernels/steel_attention.h"
TYPES = {mx.float16: "half", mx.bfloat16: "bfloat", mx.float32: "float"}
KINDS = {mx.float32: "op", mx.float16: "float16", mx.bfloat16: "bfloat16"}
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@pytest.fixture
def cpu_harness():
    need_cpu_harness()


def mlx_text(name, **constants):
    """One of mlx's kernels with all it includes, function constants set."""
    seen = set()

    def flat(name):
        if name in seen or name.endswith(("kernels/utils.h", "kernels/defines.h")):
            return ""
        seen.add(name)
        lines = []
        for line in (INCLUDE / name).read_text().splitlines():
            m = re.match(r'\s*#include "(mlx/[^"]+)"', line)
            lines.append(
                flat(m[1]) if m else "" if line.startswith("#pragma") else line
            )
        return "\n".join(lines)

    text = re.sub(
        r"constant (bool|int) (\w+) \[\[function_constant\(\d+\)\]\];",
        lambda m: (
            f"constant {m[1]} {m[2]} = {str(constants.get(m[2], False)).lower()};"
        ),
        flat(name),
    )
    return re.sub(r"\[\[kernel,[^\]]*\]\]", "[[kernel]]", text)


def qkv(dtype, B, H, Hkv, T, N, D):
    keys = mx.random.split(mx.random.key(0), 3)
    shapes = (B, H, T, D), (B, Hkv, N, D), (B, Hkv, N, D)
    return [
        mx.random.normal(shape, key=key).astype(dtype)
        for shape, key in zip(shapes, keys, strict=True)
    ]


def reference(q, k, v, **options):
    q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    return mx.fast.scaled_dot_product_attention(
        q, k, v, scale=q.shape[-1] ** -0.5, **options
    )


def numbers(kind, *values):
    return np.array(values, kind).tobytes()


@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
def test_the_vector_kernel(dtype, assert_close):
    B, H, Hkv, N, D = 1, 4, 2, 77, 128
    q, k, v = qkv(dtype, B, H, Hkv, 1, N, D)
    strides = [numbers(np.int64, n) for n in (N * D, D, N * D, D)]
    values = [to_bytes(q), to_bytes(k), to_bytes(v), None]
    values += [numbers(np.int32, H // Hkv), numbers(np.int32, N), *strides]
    values += [numbers(np.float32, D**-0.5)]
    buffers = {i: Buffer(f"b{i}", x, q.nbytes) for i, x in enumerate(values)}
    out = run_text(
        mlx_text(f"{KERNELS}/sdpa_vector.h"),
        "sdpa_vector",
        f"<{TYPES[dtype]},{D},{D}>",
        buffers,
        (B * H, 1, 1),
        (1024, 1, 1),
        prologue=f"  typedef {TYPES[dtype]} T;",
    )
    result = from_bytes(out["b3"], q.shape, dtype)
    assert_close(result, reference(q, k, v), KINDS[dtype])


def steel(H, Hkv, T, N, D, dtype, causal=False, edit=lambda text: text):
    """What the full kernel gives, and what it should."""
    B, BQ, BK = 1, 32, 32 if D < 128 else 16
    q, k, v = qkv(dtype, B, H, Hkv, T, N, D)
    tiles = -(-T // BQ), -(-N // BK), T // BQ, N // BK
    ends = T - tiles[2] * BQ, N - tiles[3] * BK, N - T
    how = struct.pack(
        "<6if7i", B, H, D, T, N, H // Hkv, D**-0.5, *tiles, *ends
    ) + struct.pack(
        "<12q",
        *(H * T * D, T * D, D, Hkv * N * D, N * D, D),
        *(Hkv * N * D, N * D, D, H * T * D, T * D, D),
    )
    text = mlx_text(STEEL, align_Q=T % BQ == 0, align_K=N % BK == 0, do_causal=causal)
    values = [to_bytes(q), to_bytes(k), to_bytes(v), None, how]
    out = run_text(
        edit(text),
        "attention",
        f"<T,32,{BK},{D},{D},4,1,T,float>",
        {i: Buffer(f"b{i}", x, q.nbytes) for i, x in enumerate(values)},
        (tiles[0], H, B),
        (32, 4, 1),
        prologue=f"  typedef {TYPES[dtype]} T; typedef T MaskType;"
        " using namespace mlx::steel;",
    )
    expected = reference(q, k, v, mask="causal" if causal else None)
    return from_bytes(out["b3"], q.shape, dtype), expected


@pytest.mark.parametrize(
    "case",
    [
        (2, 2, 45, 45, 80, mx.float16),
        (1, 1, 64, 96, 80, mx.bfloat16),
        (4, 2, 40, 72, 128, mx.float16, True),
    ],
    ids=["unaligned", "bfloat", "causal"],
)
def test_the_full_kernel(case, assert_close):
    assert_close(*steel(*case), KINDS[case[5]])


# The others stand in branches that heads of 80 do not take.
@pytest.mark.parametrize("i", [1, 2, 5, 6])
def test_a_barrier_taken_away_is_a_race(i):
    def edit(text):
        body = text.index("void attention(")
        places = [m.start() for m in re.finditer(re.escape(BARRIER), text)]
        at = [place for place in places if place > body][i]
        return text[:at] + text[at:].replace(BARRIER, ";", 1)

    with pytest.raises(MSLError, match="race"):
        steel(1, 1, 40, 72, 80, mx.float16, edit=edit)
