"""Exponents are those of the powers behind the points; every size is run in every round."""

import json
import math
from itertools import pairwise

import mlx.core as mx
import pytest

from benchmarks import growth
from benchmarks.growth import (
    CONFIG,
    Table,
    decoding,
    encoding,
    expert_layer,
    experts,
    fit,
    markdown,
    reading,
)
from benchmarks.peers import fixture
from mm1_mlx.convert.formats import llava_hf
from mm1_mlx.convert.source import Source
from mm1_mlx.models import MM1
from mm1_mlx.work import decoder_flops, encode_flops


def test_the_exponent_of_a_power_is_found_exactly():
    xs = [1, 2, 4, 8, 16]
    exponent, error = fit(xs, [3 * x**1.5 for x in xs])
    assert exponent == pytest.approx(1.5)
    assert error == pytest.approx(0, abs=1e-9)


def test_the_standard_error_is_that_of_a_slope():
    # By hand: logarithms 0, 1, 2 (of e) against 0, 1, 0: a slope of 0, residuals of
    # -1/3, 2/3, -1/3, so 6/9 over 1 degree of freedom and a spread of 2.
    exponent, error = fit([1, math.e, math.e**2], [1, math.e, 1])
    assert exponent == pytest.approx(0)
    assert error == pytest.approx(math.sqrt(6 / 9 / 1 / 2))
    assert fit([1, 2], [1, 8]) == (pytest.approx(3), None)


def test_a_table_takes_the_medians():
    table = Table("prefill", "context", lambda n: n**2)
    for n in (1, 2, 4):
        for factor in (1, 1000, 0.9):
            table.add(n, n * factor)
    found = table.to_dict()
    assert found["exponent"] == pytest.approx(1)
    assert found["operations_exponent"] == pytest.approx(2)
    assert [p["median_seconds"] for p in found["points"]] == [1, 2, 4]
    assert found["points"][1]["max_seconds"] == 2000
    lines = markdown(found).splitlines()
    assert lines[0] == (
        "prefill against context: time grows with the power 1.00 ± 0.00, operations "
        "with 2.00"
    )
    assert lines[2] == "| context | 1 | 2 | 4 |"
    assert lines[4] == "| s | 1 | 2 | 4 |"


def test_the_model_is_the_one_of_the_comparison_with_peers(tmp_path):
    for name, values in (
        ("config.json", fixture.CONFIG),
        ("preprocessor_config.json", fixture.PREPROCESSOR),
        ("processor_config.json", fixture.PROCESSOR),
        ("tokenizer_config.json", fixture.TOKENIZER),
    ):
        (tmp_path / name).write_text(json.dumps(values))
    fixture.tokenizer().save(str(tmp_path / "tokenizer.json"))
    with Source(str(tmp_path)) as source:
        config = llava_hf.config(source)
    for part in ("vision", "connector", "decoder"):
        assert getattr(CONFIG, part) == getattr(config, part), part
    sizes = sum(x.size for x in MM1(CONFIG).tensors().values())
    assert round(sizes / 1e6) == 174


def test_prompts_are_read_once_and_decoding_leaves_them_as_they_are(
    tiny_model, monkeypatch
):
    read, offsets = [], []
    prefill, decode = growth.prefill, growth.decoding

    def watched(model, context):
        assert context.embeddings.shape[0] == (
            len(context.prompt.tokens) - context.reused
        )
        read.append((context.reused, len(context.prompt.tokens)))
        return prefill(model, context)

    def decoded(model, cache):
        depth = cache[0].offset
        before = mx.array(cache[0].keys[..., :depth, :])
        seconds = decode(model, cache)
        assert mx.array_equal(before, cache[0].keys[..., :depth, :])
        offsets.append(cache[0].offset)
        return seconds

    monkeypatch.setattr(growth, "prefill", watched)
    monkeypatch.setattr(growth, "decoding", decoded)
    tables = reading(tiny_model, "context", 2, (4, 8, 16), 2, decode=True)
    pieces = [(0, 8), (8, 16), (16, 32)]
    assert read == pieces[:2] + pieces * 2
    assert offsets == [end for _, end in read]
    prompts, steps = (table.to_dict()["points"] for table in tables)
    decoder = tiny_model.config.decoder
    assert [p["n"] for p in prompts] == [p["n"] for p in steps] == [4, 8, 16]
    assert [p["operations"] for p in prompts] == [
        decoder_flops(decoder, n) for n in (8, 16, 32)
    ]
    assert steps[0]["operations"] == decoder_flops(decoder, 1, 8)
    # The time of a prompt holds that of its beginning.
    for a, b in pairwise(prompts):
        assert 0 < a["median_seconds"] < b["median_seconds"]


def test_decoding_counts_tokens(tiny_model, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(growth.time, "perf_counter", lambda: next(clock))
    cache = tiny_model.make_cache()
    tiny_model(mx.array([[1, 2, 3]]), cache)
    assert decoding(tiny_model, cache) == 1 / growth.DECODED
    assert cache[0].offset == 3


def test_pictures_are_encoded_together(tiny_model):
    table = encoding(tiny_model, (1, 2, 3), 2).to_dict()
    assert [p["n"] for p in table["points"]] == [1, 2, 3]
    assert [p["operations"] for p in table["points"]] == [
        encode_flops(tiny_model.config, n) for n in (1, 2, 3)
    ]


def test_layers_differ_in_their_experts_alone(monkeypatch):
    for name in ("EXPERT_WIDTH", "EXPERT_HIDDEN", "EXPERT_ROWS"):
        monkeypatch.setattr(growth, name, 32)
    for n in (8, 16):
        layer = expert_layer(n)
        assert layer.switch_mlp.up_proj.weight.shape == (n, 32, 32)
        assert layer.moe.experts_per_token == 2
    many, single = (table.to_dict() for table in experts((8, 16, 32), 2))
    # Two experts of three matrices, and the router's row per expert.
    assert [p["operations"] for p in single["points"]] == [
        2 * (2 * 3 * 32 * 32 + 32 * n) for n in (8, 16, 32)
    ]
    assert many["points"][0]["operations"] == 32 * single["points"][0]["operations"]
    assert len(many["points"]) == 3
