"""Rows of a benchmark: what is run for each, what its limit is, and random weights."""

import math
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mm1_mlx import checkpoint, device, generate
from mm1_mlx.bench import machine, rows, synthetic
from mm1_mlx.bench.machine import commit
from mm1_mlx.bench.rows import Plan, Row, check, measure
from mm1_mlx.bench.synthetic import open_synthetic, synthetic_model
from mm1_mlx.chips import Chip
from mm1_mlx.config import Packing
from mm1_mlx.device import measure_speed, nominal
from mm1_mlx.errors import CheckpointError, MemoryLimitError, PromptError
from mm1_mlx.models import MM1
from mm1_mlx.work import decoder_flops, encode_flops

# Bound by its operations, and by its bytes.
SLOW = Chip("slow", 1, 1e18, 1e9, ())
NARROW = Chip("narrow", 1, 1e9, 1e18, ())
PLAN = Plan(prompt=24, generate=6, depth=32, repetitions=2)
ANSWER = SimpleNamespace(cached_tokens=0, timings=SimpleNamespace(first_token=1.0))


@pytest.fixture(scope="module")
def runtime(make_config):
    with open_synthetic("small", make_config(), dtype=mx.float32) as opened:
        yield opened


@pytest.fixture(scope="module")
def wide(make_config):
    """One whose keys can be packed in groups of 64."""
    config = make_config(
        decoder={"hidden_size": 64, "head_dim": 64}, connector={"output_size": 64}
    )
    with open_synthetic("wide", config, dtype=mx.float32) as opened:
        yield opened


def bench(runtime, plan=PLAN, **chips):
    told = []
    made = measure(runtime, plan, chips, told.append)
    return {row.name: row for row in made}, told


def test_there_is_a_row_for_everything_that_is_asked(runtime):
    found, told = bench(runtime)
    names = ["enc1@16", "pp24", "tg6", "tg6@d32", "ttft(1img+56)"]
    assert list(found) == names
    assert [name for name in told if name in found] == names
    for row in found.values():
        assert len(row.seconds) == 2
        assert min(row.seconds) > 0
    assert found["pp24"].rate(2.0) == 12
    assert found["tg6"].rate(2.0) == 3
    assert found["ttft(1img+56)"].rate(2.0) == 2.0


def test_nothing_leaves_rows_out_but_the_first_token(runtime):
    found, _ = bench(runtime, Plan(prompt=0, generate=0, images=0, repetitions=1))
    assert list(found) == ["ttft(56)"]
    found, _ = bench(
        runtime, Plan(prompt=0, generate=0, images=3, repetitions=1), slow=SLOW
    )
    assert list(found) == ["enc3@16", "ttft(3img+56)"]
    assert found["enc3@16"].rate(1.5) == 2
    assert found["enc3@16"].limits["slow"] == (
        encode_flops(runtime.config, 3) / SLOW.flops
    )


def test_limits_are_those_of_the_work(runtime):
    found, _ = bench(runtime, slow=SLOW, narrow=NARROW)
    config = runtime.config
    read = found["pp24"].limits["slow"]
    assert read == decoder_flops(config.decoder, 24) / SLOW.flops
    picture = encode_flops(config, 1) / SLOW.flops
    assert found["enc1@16"].limits["slow"] == picture
    question = decoder_flops(config.decoder, 56 + 4) / SLOW.flops
    assert found["ttft(1img+56)"].limits["slow"] == pytest.approx(picture + question)
    # Float32, without the embedding's rows: that is what a token reads.
    weights = sum(
        tensor.nbytes
        for name, tensor in runtime.model.tensors().items()
        if name.startswith("decoder.") and "embed_tokens" not in name
    )
    weights += 4 * config.decoder.hidden_size
    heads, width = config.decoder.num_key_value_heads, config.decoder.head_dim
    kept = 2 * 2 * heads * width * 4 * 3  # two layers, half of the six tokens
    assert found["tg6"].limits["narrow"] == pytest.approx(
        6 * (weights + kept) / NARROW.bandwidth
    )
    row = found["pp24"]
    assert row.share("slow") == read / row.median


def test_what_is_run_is_what_the_row_says(runtime, monkeypatch):
    """Positions that the decoder sees, and tiles, row by row."""
    seen = []
    hidden, vision = rows.prefill, runtime.model.vision

    def counted(model, context, **options):
        seen.append(len(context.prompt.tokens))
        return hidden(model, context, **options)

    monkeypatch.setattr(rows, "prefill", counted)
    tiles = []

    class Counting:
        def __call__(self, pixels):
            tiles.append(pixels.shape)
            return vision(pixels)

    monkeypatch.setitem(runtime.model, "vision", Counting())
    bench(runtime)
    # A run before the two that count; then the depth, once.
    assert seen == [24, 24, 24, 32]
    # To encode, and anew for every first token.
    assert tiles == [(1, 16, 16, 3)] * 6


def test_decoding_begins_at_the_same_depth_every_time(runtime, monkeypatch):
    offsets = []
    decode = rows.decode

    def watched(model, token, cache, *rest):
        offsets.append(cache[0].offset)
        tokens = list(decode(model, token, cache, *rest))
        assert len(tokens) == 6
        return tokens

    monkeypatch.setattr(rows, "decode", watched)
    bench(runtime)
    assert offsets == [0, 0, 0, 32, 32, 32]


def test_tokens_are_decoded_as_answers_are():
    """What an answer runs, and the row, is one function."""
    from mm1_mlx import request

    assert rows.decode is request.decode


@pytest.mark.parametrize("bits", [8, 4])
def test_keys_are_packed_from_the_first_on(wide, bits, monkeypatch):
    seen = []
    decode, prefill = rows.decode, rows.prefill

    def watched(model, token, cache, *rest):
        yield from decode(model, token, cache, *rest)
        seen.append({getattr(layer, "bits", None) for layer in cache})

    def read(model, context):
        logits = prefill(model, context)
        seen.append({getattr(layer, "bits", None) for layer in context.cache})
        return logits

    monkeypatch.setattr(rows, "decode", watched)
    monkeypatch.setattr(rows, "prefill", read)
    plan = replace(PLAN, kv_bits=bits)
    found, _ = bench(wide, plan, narrow=NARROW)
    assert list(found) == ["enc1@16", "pp24", "tg6", "tg6@d32", "ttft(1img+56)"]
    # A prompt three times, tokens as often, the depth, tokens behind it.
    assert seen == [{bits}] * 10
    kept = wide.engine.prefixes
    assert kept.nbytes == 0
    plain, _ = bench(wide, PLAN, narrow=NARROW)
    decoder = wide.config.decoder
    numbers = 2 * 2 * decoder.num_key_value_heads * decoder.head_dim
    # Float32 against bits and, of every 64, a scale and a bias.
    less = numbers * (4 - (bits + 1) / 8) * (32 + 3)
    limits = (x["tg6@d32"].limits["narrow"] for x in (plain, found))
    assert -math.fsum((-next(limits), next(limits))) * NARROW.bandwidth / 6 == (
        pytest.approx(less, rel=1e-3)
    )


def test_answers_to_the_question_have_packed_keys_too(wide, monkeypatch):
    asked = []
    monkeypatch.setattr(
        rows, "generate", lambda *_, **options: asked.append(options) or ANSWER
    )
    bench(wide, Plan(prompt=0, generate=0, repetitions=1, kv_bits=8))
    assert asked == [{"max_tokens": 1, "kv_bits": 8, "kv_start": 0}] * 2


def test_the_embedded_model_has_a_row_of_its_own_text_length():
    from mm1_mlx import load

    with load() as tiny:
        found, _ = bench(tiny, Plan(prompt=8, generate=2, repetitions=1))
    assert list(found) == ["enc1@96", "pp8", "tg2", "ttft(1img+56)"]


def test_encoders_of_the_papers_sizes_have_a_row_of_high_resolution(make_config):
    config = make_config(
        vision={"image_size": 224, "patch_size": 56},
        image={"size": 224},
        connector={"num_features": 16},
    )
    plan = Plan(prompt=0, generate=0, repetitions=1)
    with open_synthetic("high", config, dtype=mx.float32) as opened:
        found, _ = bench(opened, plan, slow=SLOW)
        assert list(found) == ["enc1@224", "enc5@672", "ttft(1img+56)"]
        assert found["enc5@672"].amount == 1
        assert found["enc5@672"].limits["slow"] == pytest.approx(
            encode_flops(config, 5, 672) / SLOW.flops
        )


def test_high_resolution_is_left_out_where_it_has_no_room(make_config, monkeypatch):
    config = make_config(
        vision={"image_size": 224, "patch_size": 56},
        image={"size": 224},
        connector={"num_features": 16},
    )
    with open_synthetic("high", config, dtype=mx.float32) as opened:
        monkeypatch.setattr(rows, "allowed", lambda: 20_000_000)
        found, told = bench(opened, Plan(prompt=0, generate=0, repetitions=1))
    assert list(found) == ["enc1@224", "ttft(1img+56)"]
    (why,) = [line for line in told if line.startswith("left out")]
    assert "5 tiles of 672 pixels need" in why


def test_plans_that_have_no_room_are_refused(runtime, monkeypatch):
    with pytest.raises(PromptError, match=r"needs 258 positions.*context holds 256"):
        bench(runtime, Plan(depth=250, generate=8, prompt=0))
    monkeypatch.setattr(rows, "allowed", lambda: 1000)
    with pytest.raises(PromptError, match=r"24 positions need .* 1.0 kB are free here"):
        bench(runtime, Plan(prompt=24, generate=0))


def test_whatever_is_wrong_is_said_before_anything_runs(runtime, wide, monkeypatch):
    for name in ("decode", "prefill", "generate"):
        monkeypatch.setattr(rows, name, pytest.fail)
    check(runtime, PLAN)
    with pytest.raises(PromptError, match="--images is 25, expected at most 24"):
        check(runtime, Plan(images=25))
    small = Plan(prompt=8, generate=2)
    # 24 of 16 image tokens.
    tight = replace(wide.config.decoder, max_position_embeddings=64)
    monkeypatch.setattr(wide.engine, "config", replace(wide.config, decoder=tight))
    with pytest.raises(PromptError, match=r"24 pictures and 56 tokens .* pass fewer"):
        check(wide, replace(small, images=24))
    with pytest.raises(PromptError, match="cannot be packed in groups"):
        check(runtime, Plan(prompt=8, generate=2, kv_bits=8))
    monkeypatch.setattr(rows, "allowed", lambda: 300_000)
    with pytest.raises(PromptError, match=r"the question needs .* pass fewer --images"):
        check(runtime, Plan(prompt=8, generate=2, images=8))


def test_a_model_without_eyes_takes_no_pictures(make_config):
    config = make_config(vision=None, connector=None, image=None)
    with open_synthetic("text", config, dtype=mx.float32) as opened:
        with pytest.raises(PromptError, match="text only; pass --images 0"):
            bench(opened)
        found, _ = bench(opened, Plan(prompt=8, generate=0, images=0, repetitions=1))
    assert list(found) == ["pp8", "ttft(56)"]


def test_rows_have_a_median_and_a_range():
    row = Row("pp100", "t/s", 100, (2.0, 1.0, 4.0), {"measured": 0.5})
    facts = row.to_dict()
    assert (facts["median"], facts["min"], facts["max"]) == (50, 25, 100)
    assert facts["limits"]["measured"] == {"value": 200, "share": 0.25}


def test_random_weights_answer_and_matrices_are_the_same_again(make_config):
    packed = {"decoder.layers.0.mlp.up_proj": Packing(group_size=32, bits=4)}
    config = make_config(decoder={"hidden_size": 64}, connector={"output_size": 64})
    models = [
        synthetic_model("small", config, packed, mx.float32).tensors() for _ in range(2)
    ]
    assert models[0].keys() == models[1].keys()
    assert "decoder.layers.0.mlp.up_proj.scales" in models[0]
    for name, tensor in models[0].items():
        assert tensor.ndim < 2 or mx.array_equal(tensor, models[1][name]), name
        if tensor.dtype == mx.float32:
            assert mx.all(mx.isfinite(tensor)), name
    assert len({float(x.flatten()[0]) for x in models[0].values() if x.ndim > 1}) > 9
    with open_synthetic("small", config, packed, mx.float32) as opened:
        assert opened.config.quantization is not None
        assert len(generate(opened, "a a", max_tokens=3).tokens) <= 3


def test_a_packed_weight_is_the_unpacked_one_rounded(make_config):
    path = "decoder.layers.0.mlp.up_proj"
    config = make_config(decoder={"hidden_size": 64}, connector={"output_size": 64})
    way = Packing(group_size=32, bits=8)
    plain = synthetic_model("small", config, {}, mx.float32).tensors()
    packed = synthetic_model("small", config, {path: way}, mx.float32).tensors()
    expected = mx.quantize(plain[f"{path}.weight"], **way.to_dict())
    for leaf, array in zip(("weight", "scales", "biases"), expected, strict=True):
        assert mx.array_equal(packed[f"{path}.{leaf}"], array)


def test_of_the_unpacked_model_there_is_never_more_than_a_piece(
    make_config, monkeypatch
):
    monkeypatch.setattr(checkpoint, "UNPACKED_SHARE", 0)
    monkeypatch.setattr(synthetic, "PIECE", 1 << 16)
    config = make_config(
        decoder={"hidden_size": 1024, "intermediate_size": 4096},
        connector={"output_size": 1024},
    )
    paths = [
        f"decoder.layers.{i}.mlp.{name}_proj"
        for i in range(2)
        for name in ("gate", "up", "down")
    ]
    way = Packing(group_size=64, bits=4)
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = synthetic_model("big", config, dict.fromkeys(paths, way), mx.float16)
    peak = mx.get_peak_memory() - before
    held = sum(x.nbytes for x in model.tensors().values())
    whole = 2 * sum(x.size for x in MM1(config).tensors().values())
    assert held < whole / 2
    # Beside what is held: a packed tensor's pieces, joined, and the piece that is drawn.
    assert peak < held + 8e6 < whole


def test_what_has_no_room_is_refused_before_it_is_made(make_config, monkeypatch):
    monkeypatch.setattr("mm1_mlx.budget.allowed", lambda: 1000)
    monkeypatch.setattr(synthetic, "pack_deferred", pytest.fail)
    with pytest.raises(CheckpointError, match=r"small needs.*or fewer bits"):
        open_synthetic("small", make_config())


def test_speed_is_that_of_the_work_that_is_done(monkeypatch):
    """A clock that advances by a second at each look: bytes and operations of a run."""
    clock = iter(range(1000))
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(clock))
    speed = measure_speed(mx.float32, read_bytes=1 << 20, side=64)
    assert speed.bandwidth == 1 << 20
    assert speed.flops == 2 * 64**3
    assert speed.seconds(2 * 64**3, 0) == 1


def test_speed_is_not_measured_where_memory_has_no_room(monkeypatch):
    monkeypatch.setattr(device, "allowed", lambda: 1000)
    with pytest.raises(MemoryLimitError, match=r"on 1.0 MB, but 1.0 kB are free here"):
        measure_speed(mx.float32, read_bytes=1 << 20, side=64)


def test_chips_are_found_by_name_and_cores():
    full = nominal("Apple M1 Max", 32)
    assert (full.bandwidth, full.flops) == (400e9, 10.4e12)
    fewer = nominal("Apple M1 Max", 24)
    assert (fewer.bandwidth, fewer.gpu_cores) == (400e9, 24)
    assert fewer.flops == pytest.approx(7.8e12)
    assert nominal("Apple M4 Max", 32).bandwidth == 410e9
    assert nominal("Apple M4 Max", 40).bandwidth == 546e9
    assert nominal("Apple M5 Max", 32).bandwidth == 460e9
    # Which of the two it is nobody said.
    assert nominal("Apple M4 Max", None) is None
    assert nominal("Apple M2", None).bandwidth == 100e9
    assert nominal("AMD EPYC", None) is None
    assert nominal("Apple M1", 9) is None
    # A projection is not what its maker says.
    assert nominal("Apple M5 Ultra", 80) is None


@pytest.fixture
def _unknown():
    """Nothing is remembered of this device."""
    device._chip.cache_clear()
    yield
    device._chip.cache_clear()


@pytest.mark.usefixtures("_unknown")
def test_a_device_is_its_makers_or_measured(monkeypatch):
    monkeypatch.setattr(device, "QUICK_BYTES", 1 << 20)
    assert device.this_chip(mx.float32).name == "measured"
    # Another device is another question.
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M4 Max"})
    monkeypatch.setattr(device, "gpu_cores", lambda: 40)
    assert device.this_chip(mx.float32) == nominal("Apple M4 Max", 40)


@pytest.mark.usefixtures("_unknown")
def test_no_speed_is_measured_without_room(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(device, "allowed", lambda: device.QUICK_BYTES - 1)
        assert device.this_chip(mx.float32) is None
    # That there was none is not remembered.
    assert device.this_chip(mx.float32) is not None


def test_the_commit_is_that_of_a_checkout(tmp_path):
    assert commit(tmp_path) is None

    def git(*arguments):
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True)

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "a")
    first = commit(tmp_path)
    assert len(first) == 12
    (tmp_path / "a").write_text("2")
    assert commit(tmp_path) == f"{first}-dirty"
    (tmp_path / "b").write_text("not in it")
    git("checkout", "-q", "a")
    assert commit(tmp_path) == first


def test_the_machine_is_described():
    facts = machine.describe("libopenblas.so.0")
    assert facts["versions"].keys() == {"mm1-mlx", "mlx", "mlx-lm"}
    assert facts["device"] == "CPU"
    assert facts["blas"] == "libopenblas.so.0"
    assert facts["chip"]
    assert math.log2(facts["memory_bytes"]) > 28


def test_image_tokens_on_disk_are_not_taken(tmp_path):
    """The first token's row encodes its pictures in every run, whatever is kept."""
    from mm1_mlx import load

    with load(features=tmp_path) as tiny:
        features = tiny.engine.features
        bench(tiny, Plan(prompt=0, generate=0, repetitions=1))
        assert tiny.engine.features is features
    assert list(tmp_path.iterdir()) == []
