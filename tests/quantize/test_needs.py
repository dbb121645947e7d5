"""What measuring and learning are said to take is at least what they take."""

import gc

import mlx.core as mx
import pytest

from mm1_mlx.quantize import find_recipe, needs, quantize

SIZES = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip
MOE = {"num_experts": 4, "experts_per_token": 2, "every": 2, "offset": 1}
# Of what was taken, the most that may be said.
MOST = 1.5


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "sparse"])
def test_what_is_said_is_taken(moe, learned, write_model, tmp_path, monkeypatch):
    """12 and 25 million parameters, stored in 16 bits and run in float32."""
    decoder = SIZES | ({"moe": moe} if moe else {})
    changes = {"decoder": decoder, "connector": {"output_size": 512}}
    source = write_model(tmp_path / "in", mx.float16, **changes)
    said = []
    check = needs.check_memory

    def remember(what, sizes, way_out):
        said.append(sum(sizes.values()))
        check(what, sizes, way_out)

    monkeypatch.setattr("mm1_mlx.quantize.job.check_memory", remember)
    # What is kept unpacked is taken of what is left over.
    monkeypatch.setattr("mm1_mlx.checkpoint.UNPACKED_SHARE", 0)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    recipe = find_recipe("4bit")
    quantize(source, tmp_path / "out", recipe, learned=learned, count=8, epochs=1)
    peak = mx.get_peak_memory() - before
    assert peak <= max(said) <= MOST * peak
