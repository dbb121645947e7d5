"""Parts of several sources make one model, or an error that names what does not fit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import sources
from PIL import Image
from typer.testing import CliRunner

from mm1_mlx.apps.cli import app
from mm1_mlx.checkpoint import load_config, load_manifest, load_model
from mm1_mlx.config import (
    AttentionPoolConfig,
    DecoderConfig,
    MM1Config,
    PromptConfig,
    SplitTiling,
)
from mm1_mlx.convert import Source, convert, describe, detect_format
from mm1_mlx.convert.connectors import connector_config
from mm1_mlx.convert.formats import llava_hf
from mm1_mlx.convert.origins import Origin
from mm1_mlx.convert.parts import compose
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.image import load_picture
from mm1_mlx.layout import Picture
from mm1_mlx.presets import PRESETS


def image_tokens(out: Path) -> mx.array:
    pixels = np.random.default_rng(0).standard_normal((1, 32, 32, 3)).astype(np.float32)
    return load_model(out).encode([Picture((pixels[0],), (32, 32), "")])[0]


@pytest.mark.parametrize(
    ("spec", "kind", "tokens"),
    [
        ("linear", "linear", 16),
        ("mlp", "mlp", 16),
        ("average-pool:4", "average_pool", 4),
        ("c-abstractor:9", "c_abstractor", 9),
    ],
)
def test_an_encoder_and_a_decoder_meet_in_a_new_connector(
    spec: str, kind: str, tokens: int, tmp_path: Path
) -> None:
    vision, decoder = sources.clip(tmp_path / "clip"), sources.llama(tmp_path / "llama")
    report = convert(
        None, tmp_path / "out", vision=str(vision), connector=spec, decoder=str(decoder)
    )
    assert report.needs_training == ("connector",)
    assert report.parts == {
        "vision": (str(vision), "clip_hf"),
        "decoder": (str(decoder), "llama_hf"),
    }
    config = load_config(tmp_path / "out")
    assert config == report.config
    assert config.connector is not None
    assert config.connector.kind == kind
    assert config.sees
    assert image_tokens(tmp_path / "out").shape == (tokens, 16)
    source = load_manifest(tmp_path / "out")["source"]
    assert source["needs_training"] == ["connector"]
    assert source["parts"]["vision"]["format"] == "clip_hf"
    assert source["parts"]["connector"] == {"initialised": True, "seed": 0}


def test_new_connectors_are_equal_every_time(tmp_path: Path) -> None:
    vision, decoder = sources.clip(tmp_path / "clip"), sources.llama(tmp_path / "llama")
    for out in ("a", "b"):
        mx.random.normal((3,))
        convert(
            None,
            tmp_path / out,
            vision=str(vision),
            connector="c-abstractor:4",
            decoder=str(decoder),
        )
    first, second = (tmp_path / out / "model.safetensors" for out in ("a", "b"))
    a, b = mx.load(str(first)), mx.load(str(second))
    assert isinstance(a, dict)
    assert isinstance(b, dict)
    assert all(mx.array_equal(a[name], b[name]) for name in a)


def test_an_encoder_is_taken_out_of_a_whole_model(tmp_path: Path) -> None:
    llava, llama = sources.llava(tmp_path / "llava"), sources.llama(tmp_path / "llama")
    report = convert(
        None, tmp_path / "out", vision=str(llava), connector="mlp", decoder=str(llama)
    )
    assert report.parts["vision"] == (str(llava), "llava_hf")
    dropped = report.dropped[str(llava)]
    assert {name.partition(".")[0] for name in dropped} == {
        "vision_tower",
        "multi_modal_projector",
        "language_model",
    }


def test_a_decoder_and_a_connector_are_taken_out_of_a_whole_model(
    tmp_path: Path,
) -> None:
    llava = sources.llava(tmp_path / "llava")
    convert(str(llava), tmp_path / "whole")
    clip = sources.clip(tmp_path / "clip")
    report = convert(str(llava), tmp_path / "out", vision=str(clip), connector="linear")
    assert report.parts == {
        "vision": (str(clip), "clip_hf"),
        "decoder": (str(llava), "llava_hf"),
    }
    whole, made = load_model(tmp_path / "whole"), load_model(tmp_path / "out")
    tokens = mx.array([[3, 4, 5]])
    assert mx.array_equal(whole(tokens), made(tokens))


def test_a_decoder_alone_and_an_encoder_alone_convert(tmp_path: Path) -> None:
    for kind in (sources.clip, sources.llama):
        out = tmp_path / f"{kind.__name__}-out"
        report = convert(str(kind(tmp_path / kind.__name__)), out)
        assert report.needs_training == ()
        assert load_model(out)


def test_a_preset_s_parts_are_initialised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = DecoderConfig.from_dict(
        {
            "vocab_size": 50,
            "hidden_size": 12,
            "intermediate_size": 20,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 6,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "max_position_embeddings": 99,
            "tie_word_embeddings": True,
        }
    )
    preset = MM1Config(decoder=decoder, prompt=PromptConfig(template="plain"))
    monkeypatch.setitem(PRESETS, "small", preset)
    clip = sources.clip(tmp_path / "clip")
    report = convert(
        None, tmp_path / "out", vision=str(clip), connector="linear", decoder="small"
    )
    assert report.needs_training == ("connector", "decoder")
    assert not report.has_tokenizer
    assert load_config(tmp_path / "out").decoder == decoder
    assert image_tokens(tmp_path / "out").shape == (16, 12)


@pytest.mark.parametrize(
    ("hidden_size", "heads"), [(12, 1), (63, 1), (64, 1), (128, 2), (2048, 32)]
)
def test_attention_pooling_has_heads_of_64_or_one(hidden_size: int, heads: int) -> None:
    vision, decoder = PRESETS["mm1-3b"].vision, PRESETS["mm1-3b"].decoder
    assert vision is not None
    assert decoder is not None
    small = {"num_attention_heads": 1, "num_key_value_heads": 1}
    decoder = replace(decoder, hidden_size=hidden_size, **small)
    made = connector_config("attention-pool:16", vision, decoder)
    assert isinstance(made, AttentionPoolConfig)
    assert made.num_attention_heads == heads


@pytest.mark.parametrize(
    ("connector", "message"),
    [
        (
            "c_abstractor:4",
            "connector 'c_abstractor:4' is none of linear, mlp, average",
        ),
        ("c-abstractor", "'c-abstractor' needs its number of image tokens, e.g."),
        ("average-pool:x", "'average-pool:x' needs its number of image tokens"),
        ("c-abstractor:" + 5000 * "9", "needs its number of image tokens, e.g."),
        ("mlp:4", "mlp makes one image token of each of the 16 features; leave out"),
        ("c-abstractor:5", "num_image_tokens: 5 is not a square number, .*; take 4"),
        (None, "vision and decoder need a connector between them, one of linear"),
    ],
)
def test_connectors_that_make_no_sense_are_refused(
    connector: str | None, message: str, tmp_path: Path
) -> None:
    vision, decoder = sources.clip(tmp_path / "clip"), sources.llama(tmp_path / "llama")
    with pytest.raises(ConfigError, match=message):
        convert(
            None,
            tmp_path / "out",
            vision=str(vision),
            connector=connector,
            decoder=str(decoder),
        )
    assert not (tmp_path / "out").exists()


def test_a_preset_s_connector_was_trained_on_nothing(tmp_path: Path) -> None:
    source = Source(str(sources.llava(tmp_path / "llava")))
    preset = PRESETS["mm1-1.2b"]
    assert preset.vision is not None
    vision = replace(preset.vision, feature_layer=-2, apply_post_norm=False)
    llava = Origin("llava", source, llava_hf, replace(preset, vision=vision))
    origins = {"vision": llava, "connector": preset, "decoder": preset}
    assert compose(origins, None).vision == vision


@pytest.mark.parametrize("part", ["vision", "connector"])
def test_a_sourced_connector_reads_the_features_it_was_trained_on(
    part: str, tmp_path: Path
) -> None:
    llava, clip = sources.llava(tmp_path / "llava"), sources.clip(tmp_path / "clip")
    if part == "vision":
        report = convert(str(llava), tmp_path / "out", vision=str(clip))
    else:
        llama = sources.llama(tmp_path / "llama")
        report = convert(
            str(llama), tmp_path / "out", vision=str(clip), connector=str(llava)
        )
    assert report.needs_training == ()
    vision = report.config.vision
    assert vision is not None
    assert (vision.feature_layer, vision.apply_post_norm) == (-2, False)


def test_a_connector_may_have_a_preset_s_shape(tmp_path: Path) -> None:
    clip, llama = sources.clip(tmp_path / "clip"), sources.llama(tmp_path / "llama")
    with pytest.raises(ConfigError, match=r"connector.input_size is 1280 but vision"):
        convert(
            None,
            tmp_path / "out",
            vision=str(clip),
            connector="mm1-3b",
            decoder=str(llama),
        )


def test_a_connector_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a vision part and a decoder"):
        convert(str(sources.llama(tmp_path / "in")), tmp_path / "out", connector="mlp")


def test_nothing_named_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one of"):
        convert(None, tmp_path / "out")


def test_sizes_that_do_not_compose_are_named(tmp_path: Path) -> None:
    llava = sources.llava(tmp_path / "llava")
    tensors = {
        n: mx.zeros((*x.shape[:-1], 8)) for n, x in sources.llama_tensors().items()
    }
    config = sources.LLAMA | {"hidden_size": 8}
    small = sources.write(tmp_path / "small", config, tensors)
    with pytest.raises(ConfigError, match=r"connector.output_size.*16.*hidden_size.*8"):
        convert(str(llava), tmp_path / "out", decoder=str(small))


def test_a_part_that_a_source_lacks_is_named(tmp_path: Path) -> None:
    clip = sources.clip(tmp_path / "clip")
    with pytest.raises(CheckpointError, match="clip holds no decoder; name another"):
        convert(None, tmp_path / "out", decoder=str(clip))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "gpt2"},
            "model type 'gpt2' .* converts .*clip_hf.*llava_hf",
        ),
        ({"model_type": ["llama"]}, "is not one this program converts"),
        ({}, "model type None"),
        (
            {
                "model_type": "deepseek_vl_v2",
                "vision_config": {},
                "projector_config": {},
            },
            "model type 'deepseek_vl_v2'",
        ),
    ],
)
def test_unknown_model_types_are_named(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = sources.write(tmp_path / "in", config, {})
    with pytest.raises(CheckpointError, match=message):
        convert(str(folder), tmp_path / "out")


def test_every_format_is_detected(tmp_path: Path) -> None:
    for config, name in (
        (sources.LLAVA, "llava_hf"),
        ({"vision_config": {}, "projector_config": {}}, "honeybee"),
        ({"model_type": "clip"}, "clip_hf"),
        ({"model_type": "mistral"}, "llama_hf"),
        ({"model_type": "qwen3"}, "qwen_hf"),
    ):
        folder = sources.write(tmp_path / name, config, {})
        assert detect_format(Source(str(folder))).__name__.endswith(name)


def test_tensors_that_do_not_fit_are_named_before_anything_is_written(
    tmp_path: Path,
) -> None:
    for name, change, message in (
        (
            "more",
            {"visual.surprise": mx.zeros(2)},
            "1 source tensors have no rule, e.g.",
        ),
        ("less", {"model.norm.weight": None}, "have no source, e.g. .'decoder.norm"),
        (
            "other",
            {"model.norm.weight": mx.zeros(5)},
            r"has shape \[5\], which does not",
        ),
    ):
        tensors: dict[str, Any] = sources.llama_tensors() | change
        kept = {n: x for n, x in tensors.items() if x is not None}
        folder = sources.write(tmp_path / name, sources.LLAMA, kept)
        with pytest.raises(CheckpointError, match=message):
            convert(str(folder), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_tied_head_that_is_stored_too_must_equal_the_embedding(
    tmp_path: Path,
) -> None:
    config = sources.LLAMA | {"tie_word_embeddings": True}
    tensors = sources.llama_tensors()
    folder = sources.write(tmp_path / "differs", config, tensors)
    with pytest.raises(CheckpointError, match=r"config.json ties 'lm_head.weight'"):
        convert(str(folder), tmp_path / "out")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    folder = sources.write(tmp_path / "equal", config, tensors)
    report = convert(str(folder), tmp_path / "out")
    assert report.dropped == {str(folder): ("lm_head.weight",)}


def test_an_existing_folder_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    llama = sources.llama(tmp_path / "in")
    convert(str(sources.clip(tmp_path / "clip")), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"out' already exists; choose another"):
        convert(str(llama), tmp_path / "out")
    convert(str(llama), tmp_path / "out", overwrite=True)
    assert load_config(tmp_path / "out").decoder


@pytest.mark.parametrize("part", ["source", "vision", "decoder"])
def test_a_source_is_never_written_onto(part: str, tmp_path: Path) -> None:
    llama = sources.llama(tmp_path / "llama")
    convert(str(llama), tmp_path / "model")
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    named = {"source": str(llama)} | {part: str(tmp_path / "model")}
    for out in ("model", "model/inside"):
        with pytest.raises(CheckpointError, match=r"is, holds or lies in '.*model'"):
            convert(**named, out=tmp_path / out, overwrite=True)  # type: ignore[arg-type]
    assert {p: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before


def test_dtypes_are_kept_unless_one_is_asked_for(tmp_path: Path) -> None:
    tensors = {n: x.astype(mx.bfloat16) for n, x in sources.llama_tensors().items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(mx.float32)
    folder = sources.write(tmp_path / "in", sources.LLAMA, tensors)
    convert(str(folder), tmp_path / "kept")
    model = load_model(tmp_path / "kept")
    assert model.decoder.embed_tokens.weight.dtype == mx.bfloat16
    assert model.decoder.norm.weight.dtype == mx.float32
    convert(str(folder), tmp_path / "cast", dtype=mx.float16)
    model = load_model(tmp_path / "cast")
    assert model.decoder.embed_tokens.weight.dtype == mx.float16
    assert model.decoder.norm.weight.dtype == mx.float16


def test_a_number_that_a_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    tensors = {k: x.astype(mx.bfloat16) for k, x in sources.llama_tensors().items()}
    tensors["model.norm.weight"][3] = 7e4
    folder = str(sources.write(tmp_path / "in", sources.LLAMA, tensors))
    message = r"decoder.norm.weight holds numbers too large for .*float16; pass --dtype bfloat"
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "half", dtype=mx.float16)
    assert not (tmp_path / "half").exists()
    convert(folder, tmp_path / "kept")
    tensors = load_model(tmp_path / "kept").tensors()
    assert tensors["decoder.norm.weight"][3].item() == 70144


def test_progress_counts_every_tensor(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    llama = sources.llama(tmp_path / "in")
    convert(str(llama), tmp_path / "out", progress=lambda *call: calls.append(call))
    assert calls == [(i + 1, 21) for i in range(21)]


def test_a_conversion_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    convert(str(sources.llava(tmp_path / "in")), tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_tokenizer_files_come_from_the_decoder(tmp_path: Path) -> None:
    clip = sources.clip(tmp_path / "clip", tokenizer={"of": "clip"})
    llama = sources.llama(tmp_path / "llama")
    (llama / "tokenizer.json").write_text('{"of": "llama"}')
    (llama / "tokenizer.py").write_text("raise SystemExit")
    report = convert(
        None, tmp_path / "out", vision=str(clip), connector="mlp", decoder=str(llama)
    )
    assert report.has_tokenizer
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {
        "of": "llama"
    }
    assert not (tmp_path / "out" / "tokenizer.py").exists()


def test_a_resolution_may_be_chosen(tmp_path: Path) -> None:
    vision, decoder = sources.clip(tmp_path / "clip"), sources.llama(tmp_path / "llama")
    report = convert(
        None,
        tmp_path / "out",
        vision=str(vision),
        connector="c-abstractor:4",
        decoder=str(decoder),
        resolution="2x48",
    )
    image = report.config.image
    assert image is not None
    assert (image.size, image.tiling) == (48, SplitTiling(grid=2))
    # The stored positions stay those that the encoder learned.
    assert report.config.vision is not None
    assert report.config.vision.image_size == 32
    photo = load_picture(Image.new("RGB", (90, 60)), image)
    tokens = load_model(tmp_path / "out").encode([photo])[0]
    assert tokens.shape == (5 * 4, 16)
    with pytest.raises(ConfigError, match="50 pixels are not a multiple"):
        convert(str(vision), tmp_path / "other", resolution="50")


def test_a_model_of_ours_can_be_converted_again(tmp_path: Path) -> None:
    convert(str(sources.llava(tmp_path / "llava")), tmp_path / "one")
    report = convert(
        str(tmp_path / "one"), tmp_path / "two", dtype=mx.float16, resolution="2x32"
    )
    assert report.parts["decoder"] == (str(tmp_path / "one"), "mm1")
    one, two = load_model(tmp_path / "one"), load_model(tmp_path / "two")
    for name, tensor in one.tensors().items():
        cast = two.tensors()[name]
        assert cast.dtype == mx.float16
        assert mx.array_equal(tensor.astype(mx.float16), cast)
    assert two.config.image is not None
    assert two.config.image.tiling == SplitTiling(grid=2)


def licensed(folder: Path, licence: str) -> Path:
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    return folder


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    """A model of two sources with licences and a new connector."""
    vision = licensed(sources.clip(tmp_path / "clip"), "mit")
    decoder = licensed(sources.llama(tmp_path / "llama"), "llama2")
    convert(str(decoder), tmp_path / "one", vision=str(vision), connector="mlp")
    return tmp_path / "one"


def test_a_model_of_ours_goes_on_saying_where_it_is_from(
    untrained: Path, tmp_path: Path
) -> None:
    before = load_manifest(untrained)["source"]
    report = convert(str(untrained), tmp_path / "two", dtype=mx.float16)
    assert report.needs_training == ("connector",)
    assert load_manifest(tmp_path / "two")["source"] == before
    assert before["parts"]["vision"]["licence"] == "mit"
    assert describe(str(tmp_path / "two")).licence == "mit and llama2"
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "two"), "--json"])
    assert json.loads(result.stdout)["source"]["needs_training"] == ["connector"]
    arguments = ["convert", str(untrained), str(tmp_path / "three")]
    said = CliRunner().invoke(app, arguments).stderr
    assert "licence mit and llama2" in said
    assert "connector: initialised, needs training" in said


def test_what_is_replaced_in_a_model_of_ours_is_recorded_anew(
    untrained: Path, tmp_path: Path
) -> None:
    llava = sources.llava(tmp_path / "llava")
    report = convert(str(untrained), tmp_path / "two", connector=str(llava))
    assert report.needs_training == ()
    record = load_manifest(tmp_path / "two")["source"]
    assert record["needs_training"] == []
    connector = {"source": str(llava), "format": "llava_hf", "licence": None}
    assert record["parts"]["connector"] == connector
    assert record["parts"]["decoder"]["licence"] == "llama2"
    other = licensed(sources.llama(tmp_path / "other"), "apache-2.0")
    convert(str(untrained), tmp_path / "three", decoder=str(other))
    record = load_manifest(tmp_path / "three")["source"]
    assert record["needs_training"] == ["connector"]
    assert record["parts"]["decoder"]["source"] == str(other)
    assert describe(str(tmp_path / "three")).licence == "mit and apache-2.0"


def rewrite(folder: Path, **fields: Any) -> None:
    """Change the folder's manifest."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "source",
    [None, [1], {"parts": [1], "needs_training": 1}, {"parts": {"vision": 3}}],
)
def test_a_manifest_that_says_nothing_of_parts_is_borne(
    source: Any, untrained: Path, tmp_path: Path
) -> None:
    rewrite(untrained, source=source)
    report = convert(str(untrained), tmp_path / "two")
    assert report.needs_training == ()
    own = {"source": str(untrained), "format": "mm1", "licence": None}
    parts = ("vision", "connector", "decoder")
    record = load_manifest(tmp_path / "two")["source"]
    assert record["parts"] == dict.fromkeys(parts, own)


def test_a_licence_that_is_no_word_is_not_shown(untrained: Path) -> None:
    rewrite(untrained, source={"licence": "mit\x1b[2J", "parts": {"a": {"licence": 3}}})
    assert describe(str(untrained)).licence is None


def test_a_model_of_ours_that_does_not_load_does_not_convert(
    untrained: Path, tmp_path: Path
) -> None:
    manifest = (untrained / "manifest.json").read_text()
    rewrite(untrained, format_version=2)
    with pytest.raises(CheckpointError, match="has format version 2, this program re"):
        convert(str(untrained), tmp_path / "two")
    (untrained / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no manifest.json, so it is not a"):
        convert(str(untrained), tmp_path / "two")
    (untrained / "manifest.json").write_text(manifest)
    config = (untrained / "config.json").read_text()
    (untrained / "config.json").write_text(config + "\n")
    with pytest.raises(CheckpointError, match=r"config.json has .* the manifest says"):
        convert(str(untrained), tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_a_trained_connector_of_ours_can_be_given_to_another_model(
    tmp_path: Path,
) -> None:
    convert(str(sources.llava(tmp_path / "llava")), tmp_path / "one")
    other = sources.llama(tmp_path / "llama")
    report = convert(str(tmp_path / "one"), tmp_path / "two", decoder=str(other))
    assert report.parts["connector"] == (str(tmp_path / "one"), "mm1")
    assert report.needs_training == ()


def test_a_source_that_several_formats_claim_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mm1_mlx.convert.formats import llama_hf

    monkeypatch.setattr(llama_hf, "detect", lambda _: True)
    folder = sources.clip(tmp_path / "clip")
    with pytest.raises(
        CheckpointError, match="fits several formats, clip_hf, llama_hf"
    ):
        convert(str(folder), tmp_path / "out")
