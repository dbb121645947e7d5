"""An upcycled decoder is the dense one right after, and bad wishes are refused."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import sources
from mlx_lm.generate import generate_step
from typer.testing import CliRunner

from mm1_mlx.apps.cli import app
from mm1_mlx.checkpoint import load_config, load_manifest, load_model
from mm1_mlx.config import (
    DecoderConfig,
    LayerSizes,
    MM1Config,
    MoEConfig,
)
from mm1_mlx.convert import convert
from mm1_mlx.convert.upcycle import Upcycle
from mm1_mlx.errors import ConfigError
from mm1_mlx.layout import Picture
from mm1_mlx.presets import PRESETS

SPEC = "experts=4,every=2"
TOKENS = mx.array([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7]])


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A Llama converted as it is, and upcycled."""
    source = str(sources.llama(tmp_path / "llama"))
    convert(source, tmp_path / "dense")
    convert(source, tmp_path / "sparse", upcycle=SPEC)
    return tmp_path / "dense", tmp_path / "sparse"


def greedy(folder: Path) -> list[int]:
    steps = generate_step(TOKENS[0], load_model(folder), max_tokens=32)
    return [int(token) for token, _ in steps]


def difference(ours: mx.array, expected: mx.array) -> float:
    return float((mx.abs(ours - expected).max() / mx.abs(expected).max()).item())


@pytest.mark.parametrize("spec", [SPEC, "experts=8,every=1,top=3", "experts=2,every=1"])
def test_the_upcycled_model_is_the_dense_one(spec: str, tmp_path: Path) -> None:
    source = str(sources.llama(tmp_path / "llama"))
    convert(source, tmp_path / "dense")
    convert(source, tmp_path / "sparse", upcycle=spec)
    dense, sparse = load_model(tmp_path / "dense"), load_model(tmp_path / "sparse")
    assert sparse.config.decoder is not None
    assert sparse.config.decoder.moe is not None
    assert difference(sparse(TOKENS), dense(TOKENS)) <= 1e-5
    expected = greedy(tmp_path / "dense")
    assert greedy(tmp_path / "sparse") == expected
    assert len(expected) == 32
    assert len(set(expected)) >= 8


def test_experts_are_copies_of_their_own_layer_and_the_router_is_new(
    pair: tuple[Path, Path],
) -> None:
    dense, sparse = (load_model(folder).tensors() for folder in pair)
    names = [f"{x}_proj.weight" for x in ("gate", "up", "down")]
    changed = [f"decoder.layers.1.mlp.{name}" for name in names]
    for name in changed:
        copies = sparse[name.replace("mlp", "mlp.switch_mlp")]
        assert copies.shape == (4, *dense[name].shape)
        assert all(mx.array_equal(copy, dense[name]) for copy in copies)
    assert not mx.array_equal(dense[changed[0]], dense[changed[0].replace("1", "0")])
    for name in set(dense) - set(changed):
        assert mx.array_equal(sparse[name], dense[name])
    router = sparse["decoder.layers.1.mlp.gate.weight"]
    assert router.shape == (4, 16)
    assert len(sparse) == len(dense) + 1
    assert mx.abs(router).max() <= 16**-0.5
    assert 0.5 < mx.std(router).item() * 48**0.5 < 1.5


def test_routers_differ_by_layer_and_are_equal_every_time(tmp_path: Path) -> None:
    source = str(sources.llama(tmp_path / "llama"))
    for out in ("a", "b"):
        mx.random.normal((3,))
        convert(source, tmp_path / out, upcycle="experts=4,every=1")
    a, b = (load_model(tmp_path / out).tensors() for out in ("a", "b"))
    assert all(mx.array_equal(a[name], b[name]) for name in a)
    first, second = (a[f"decoder.layers.{i}.mlp.gate.weight"] for i in (0, 1))
    assert not mx.allclose(first, second)


def test_config_report_and_manifest_say_what_was_made(tmp_path: Path) -> None:
    source = str(sources.llama(tmp_path / "llama"))
    seen: list[tuple[int, int]] = []
    report = convert(
        source,
        tmp_path / "out",
        upcycle="experts=4,every=2,offset=0,top=1",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert report.needs_training == ("router",)
    assert report.config == load_config(tmp_path / "out")
    assert report.config.decoder is not None
    moe = MoEConfig(num_experts=4, experts_per_token=1, every=2, offset=0)
    assert report.config.decoder.moe == moe
    assert moe.norm_topk_prob
    record = load_manifest(tmp_path / "out")["source"]
    assert record["needs_training"] == ["router"]
    assert record["parts"]["router"] == {"initialised": True, "seed": 0}
    assert record["parts"]["decoder"]["format"] == "llama_hf"
    assert seen[-1] == (22, 22)


def test_the_last_layer_of_a_group_is_sparse_unless_told_otherwise() -> None:
    assert Upcycle.parse("experts=64,every=4").moe == MoEConfig(
        num_experts=64, experts_per_token=2, every=4, offset=3
    )
    assert Upcycle.parse("offset=1,top=3,every=4,experts=9").moe == MoEConfig(
        num_experts=9, experts_per_token=3, every=4, offset=1
    )


@pytest.mark.parametrize(
    ("preset", "spec"),
    [("mm1-3b", "experts=64,every=2"), ("mm1-7b", "experts=32,every=4")],
)
def test_the_papers_sparse_models_are_their_dense_ones_upcycled(
    preset: str, spec: str
) -> None:
    sparse = Upcycle.parse(spec).config(PRESETS[preset])
    assert sparse.decoder == PRESETS[f"{preset}-moe"].decoder


def test_the_decoder_of_a_whole_model_is_upcycled_and_sees_the_same(
    tmp_path: Path,
) -> None:
    source = str(sources.llava(tmp_path / "llava"))
    convert(source, tmp_path / "dense")
    report = convert(source, tmp_path / "sparse", upcycle="experts=4,every=1")
    assert report.needs_training == ("router",)
    pixels = np.random.default_rng(0).standard_normal((32, 32, 3)).astype(np.float32)
    logits = []
    for name in ("dense", "sparse"):
        model = load_model(tmp_path / name)
        image = model.encode([Picture((pixels,), (32, 32), "")])[0]
        logits.append(model(mx.zeros((1, 16), mx.int32), None, image[None]))
    assert difference(logits[1], logits[0]) <= 1e-5


def test_an_initialised_decoder_is_upcycled_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = load_config_of(tmp_path)
    monkeypatch.setitem(PRESETS, "small", dense)
    report = convert(None, tmp_path / "out", decoder="small", upcycle=SPEC)
    assert report.needs_training == ("decoder", "router")
    assert load_model(tmp_path / "out")(TOKENS).shape == (1, 10, 64)


def load_config_of(folder: Path) -> MM1Config:
    convert(str(sources.llama(folder / "llama")), folder / "dense")
    return load_config(folder / "dense")


def test_weights_are_cast_as_they_are_asked_for(tmp_path: Path) -> None:
    source = str(sources.llama(tmp_path / "llama"))
    convert(source, tmp_path / "out", upcycle=SPEC, dtype=mx.bfloat16)
    tensors = load_model(tmp_path / "out").tensors().values()
    assert {tensor.dtype for tensor in tensors} == {mx.bfloat16}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("64", r"upcycle '64' is not of the form experts=64,every=2\[,offset=1\]"),
        ("", "upcycle '' is not of the form experts=64"),
        ("experts=4", "'experts=4' is not of the form"),
        ("every=2", "'every=2' is not of the form"),
        ("experts=4,every=two", "'experts=4,every=two' is not of the form"),
        ("experts=4,every=2,every=3", "'experts=4,every=2,every=3' is not of the form"),
        ("experts=4,every=2,capacity=2", "capacity=2' is not of the form"),
        ("experts=4,every=2,top=-1", "top=-1' is not of the form"),
        ("experts=4=5,every=2", "'experts=4=5,every=2' is not of the form"),
        ("experts=4,every=" + 5000 * "9", "9' is not of the form"),
        ("experts=600,every=2", "num_experts: 600 is outside 1..512"),
        ("experts=1,every=2", "experts_per_token: 2 is outside 1..1"),
        ("experts=4,every=0", "MoEConfig.every: 0 is outside 1"),
        ("experts=4,every=2,offset=2", "MoEConfig.offset: 2 is outside 0..1"),
        ("experts=4,every=3", "every=3,offset=2 makes none of the 2 layers sparse"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(
    spec: str, message: str, tmp_path: Path
) -> None:
    source = str(sources.llama(tmp_path / "llama"))
    with pytest.raises(ConfigError, match=message):
        convert(source, tmp_path / "out", upcycle=spec)
    assert not (tmp_path / "out").exists()


def changed(decoder: DecoderConfig, **fields: Any) -> MM1Config:
    return MM1Config(decoder=replace(decoder, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"moe": MoEConfig(num_experts=3, every=1, offset=0)},
            "the decoder has 3 experts already; upcycle a dense one",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' cannot be upcycled, for experts"),
        ({"mlp_bias": True}, "mlp_bias cannot be upcycled, for experts have no biases"),
        (
            {
                "layer_sizes": (
                    LayerSizes(
                        num_attention_heads=2,
                        num_key_value_heads=1,
                        intermediate_size=24,
                    ),
                )
                * 2
            },
            "whose layers differ in size cannot be upcycled; choose one whose",
        ),
    ],
)
def test_decoders_that_experts_cannot_copy_are_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    decoder = load_config_of(tmp_path).decoder
    assert decoder is not None
    with pytest.raises(ConfigError, match=message):
        Upcycle.parse(SPEC).config(changed(decoder, **fields))


def test_an_encoder_alone_is_refused(tmp_path: Path) -> None:
    clip = str(sources.clip(tmp_path / "clip"))
    with pytest.raises(ConfigError, match="there is no decoder to upcycle; name a sou"):
        convert(clip, tmp_path / "out", upcycle=SPEC)


def test_a_router_needs_training_until_its_decoder_is_replaced(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    _, sparse = pair
    before = load_manifest(sparse)["source"]
    report = convert(str(sparse), tmp_path / "again", dtype=mx.float16)
    assert report.needs_training == ("router",)
    assert load_manifest(tmp_path / "again")["source"] == before
    clip, other = sources.clip(tmp_path / "clip"), sources.llama(tmp_path / "other")
    report = convert(
        str(sparse),
        tmp_path / "other-out",
        vision=str(clip),
        connector="mlp",
        decoder=str(other),
    )
    assert report.needs_training == ("connector",)
    assert "router" not in load_manifest(tmp_path / "other-out")["source"]["parts"]


def run(arguments: Sequence[str]) -> Any:
    return CliRunner().invoke(app, [*arguments])


def test_the_command_upcycles_and_says_that_the_router_needs_training(
    tmp_path: Path,
) -> None:
    source, out = str(sources.llama(tmp_path / "llama")), str(tmp_path / "out")
    result = run(["convert", source, out, "--upcycle", SPEC])
    assert result.exit_code == 0
    assert "router: initialised, needs training" in result.stderr
    config = load_config(tmp_path / "out")
    assert config.decoder is not None
    assert config.decoder.moe is not None
    assert config.decoder.moe.num_experts == 4


MEMORY = """
import resource, sys
from pathlib import Path
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mm1_mlx import writer
from mm1_mlx.convert import convert
writer.MAX_SHARD_BYTES = 20_000_000
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(sys.argv[1], Path(sys.argv[2]) / "dense")
before = peak()
convert(sys.argv[1], Path(sys.argv[2]) / "sparse", upcycle="experts=64,every=1")
print(peak() - before)
"""


def test_upcycling_holds_one_layers_copies_at_a_time(tmp_path: Path) -> None:
    D, H = 256, 512
    tensors = sources.llama_tensors()
    for name in tensors:
        for leaf, shape in (("gate", (H, D)), ("up", (H, D)), ("down", (D, H))):
            if f"{leaf}_proj" in name and "mlp" in name:
                tensors[name] = mx.random.normal(shape)
        if "norm" in name:
            tensors[name] = mx.ones(D)
        elif "self_attn" in name:
            kv = "k_proj" in name or "v_proj" in name
            shape = (D // 2, D) if kv else (D, D)
            tensors[name] = mx.random.normal(shape)
        elif "embed" in name or "head" in name:
            tensors[name] = mx.random.normal((64, D))
    fields = sources.LLAMA | {"hidden_size": D, "intermediate_size": H}
    source = sources.write(tmp_path / "llama", fields, tensors)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(source), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    growth = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    largest = 64 * H * D * 4
    written = sum(f.stat().st_size for f in (tmp_path / "sparse").iterdir())
    assert written > 6 * largest
    # Of six such tensors; the rest is what the process takes besides.
    assert growth < 1.2 * largest + 20_000_000
