"""On a Mac's GPU, mlx's attention is fused for the shapes that are left to it."""

import mlx.core as mx
import pytest
from attention_runs import exact, make_run, numbers

# B, Hq, Hkv, T, keys, D, mask
SHAPES = {
    "a ViT's": (2, 1, 1, 730, 730, 80, None),
    "a prompt's": (1, 8, 2, 40, 40, 128, "causal"),
    "a prompt's, behind others": (1, 8, 2, 40, 72, 128, "causal"),
    "heads of 64": (1, 4, 4, 40, 40, 64, "causal"),
    "a step's": (1, 8, 2, 1, 300, 128, None),
    "guessed tokens'": (1, 8, 2, 4, 300, 128, "causal"),
    "a step's, heads of 64": (1, 4, 2, 1, 300, 64, None),
}


def forced(q, run, scale, mask):
    """mlx's attention, which raises where no kernel is fused for it."""
    return mx.fast.scaled_dot_product_attention(
        q, run.keys, run.values, scale=scale, mask=mask, force_fused=True
    )


@pytest.mark.metal
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mlx_fuses(shape, dtype, assert_close):
    B, Hq, Hkv, T, keys, D, mask = shape
    run = make_run(B, Hkv, keys, D, dtype=dtype)
    q = numbers((B, Hq, T, D), dtype, 0)
    out = forced(q, run, D**-0.5, mask)
    expected = exact(q, [run], D**-0.5, causal=mask == "causal")
    assert_close(out, expected, str(dtype).removeprefix("mlx.core."))


def test_what_is_not_fused_is_refused():
    """So that the test above can fail; a CPU fuses nothing."""
    run = make_run(1, 1, 9, 80, dtype=mx.float32)
    with pytest.raises(ValueError, match="no fused kernel is available"):
        mx.eval(forced(numbers((1, 1, 9, 80), mx.float32, 0), run, 0.1, None))
