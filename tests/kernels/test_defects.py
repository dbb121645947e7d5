"""Defects planted in the kernels' text: each must be caught, and by the check named."""

import re

import mlx.core as mx
import pytest
from attention_runs import exact, make_run, numbers
from metal_cpu import CPUFactory
from msl_build import MSLError

from mm1_mlx.kernels import metal

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
FIRST = f"{BARRIER}\n\n    float qsum"
LAST = f"{BARRIER}\n    for (int i = tid; i < live"

# What is replaced, by what, and what the harness says.
PARTIAL = {
    "first barrier missing": (FIRST, "\n\n    float qsum", "race|uninitialised"),
    "barrier without memory": (
        FIRST,
        FIRST.replace("mem_threadgroup)", "mem_none)"),
        "race|uninitialised",
    ),
    "last barrier missing": (LAST, LAST.replace(BARRIER, ""), "race|uninitialised"),
    "barrier not for all": (LAST, f"if (sg == 0) {LAST}", "returned|race|uninit"),
    "wrong address space": (
        "const threadgroup float4* rows4 = (const threadgroup float4*)",
        "const device float4* rows4 = (const device float4*)",
        "compile failed",
    ),
    "address space forgotten": (
        "const device uint* from",
        "const uint* from",
        "compile failed",
    ),
    "reads past the last key": (
        "min(t + step * 8 + quad, end - 1)",
        "(t + step * 8 + quad)",
        "out-of-bounds",
    ),
    "misaligned vectors": (
        "quarter * WORDS);",
        "quarter * WORDS + 1);",
        "misaligned|out-of-bounds",
    ),
    "simd function not for all": (
        "const float sum = simd_sum(l[r]);",
        "const float sum = lane < 16 ? simd_sum(l[r]) : 0.0f;",
        "simdgroup op",
    ),
    "two groups write one place": (
        "* blocks + block;",
        "* blocks;",
        "race-between-threadgroups",
    ),
    "output not written": ("pl[at] = sum_l;", "if (sum_l < 0) pl[at] = 0;", "never"),
    "input written": (
        "pm[at] = largest;",
        "pm[at] = largest; ((device uint*)k)[0] = 0;",
        "write-to-input|compile failed",
    ),
    "too much threadgroup memory": (
        "red_o[SG * R * D];",
        "red_o[SG * R * D + 8192];",
        "threadgroup memory",
    ),
    "vectors of two types": (
        "const Some words = from[i];",
        "const float4 words = from[i];",
        "compile failed",
    ),
    "double": (
        "constexpr float NEVER = -1e30f;",
        "constexpr float NEVER = -1e30f; const float half_ = 0.5 * NEVER;",
        "double literal",
    ),
    "C function": ("shrink = metal::fast::exp(", "shrink = expf(", "C math name"),
    "bias dropped": ("+ zero * qsum[r]", "", "numbers"),
    "value bias dropped": ("& MASK) + zero;", "& MASK);", "numbers"),
    "causal limit off by one": ("% T_q + 1)", "% T_q)", "numbers"),
    "padding seen": ("max(int(starts[b]), block * chunk)", "block * chunk", "numbers"),
    "not rescaled": ("o[r][d] *= shrink;", "o[r][d] *= 1.0f;", "numbers"),
    "sum not rescaled": ("l[r] * shrink + s[r]", "l[r] + s[r]", "numbers"),
    "weights in half precision": (
        "weight = simd_shuffle(s[r], owner)",
        "weight = float(half(simd_shuffle(s[r], owner)))",
        "numbers",
    ),
    "weights of another key": ("j % 8 * 4 + j / 8", "j", "numbers"),
    "simdgroups not weighted": ("sum_l += weight *", "sum_l +=", "numbers"),
}
MERGE = {
    "parts not weighted": ("o += weight *", "o +=", "numbers"),
    "last part left out": (
        "i < n; i++) {\n        const",
        "i < n - 1; i++) {\n        const",
        "numbers",
    ),
    "row of another": ("out[row * D + d]", "out[(row ^ 1) * D + d]", "numbers"),
}
DEFECTS = [
    pytest.param(name, *what, id=what_id)
    for name, planted in ((metal.PARTIAL, PARTIAL), (metal.MERGE, MERGE))
    for what_id, what in planted.items()
]


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_factory")
@pytest.mark.parametrize(("kernel", "old", "new", "said"), DEFECTS)
def test_a_defect_is_caught(kernel, old, new, said, tolerances):
    assert old in metal.source(kernel)

    def edit(name, text):
        return text.replace(old, new, 1) if name == f"mm1_{kernel}" else text

    # Every loop runs at least twice: keys of a simdgroup, blocks, rows, parts.
    run = make_run(2, 2, 601, 64, dtype=mx.float32, bits=8, group=32, starts=[0, 300])
    q = numbers((2, 4, 2, 64), mx.float32, 0)
    factory = CPUFactory(edit=edit)
    try:
        state = metal.partial(
            q, run, scale=0.125, causal=True, factory=factory, chunk=256
        )
        out = metal.merge([state], q, factory=factory)
    except MSLError as error:
        found = str(error)
    else:
        expected = exact(q, [run], 0.125, causal=True)
        difference = abs(mx.array(expected.astype("float32")) - out).max().item()
        bound = 10 * tolerances["kernel"]
        found = "numbers" if difference > bound else f"nothing, {difference:.1e}"
    assert re.search(said, found), found
