"""Configs are strict, say what is wrong, and never cost memory."""

import copy
import json
import random
import re
import subprocess
import sys
import time

import pytest

from mm1_mlx.config import (
    AveragePoolConfig,
    CAbstractorConfig,
    DecoderConfig,
    ImageConfig,
    LinearConfig,
    MLPConfig,
    MM1Config,
    MoEConfig,
    PromptConfig,
    RopeScaling,
    VisionConfig,
)
from mm1_mlx.errors import ConfigError
from mm1_mlx.presets import PRESETS

SIZES = {"input_size": 32, "num_features": 16, "output_size": 48}
SECTIONS = [
    LinearConfig(**SIZES, bias=False),
    MLPConfig(**SIZES, hidden_size=64, hidden_act="gelu_tanh"),
    AveragePoolConfig(**SIZES, num_image_tokens=4),
    CAbstractorConfig(**SIZES, num_image_tokens=6, num_eos_tokens=2, prenorm=True),
    MoEConfig(num_experts=4, every=2, offset=1, norm_topk_prob=False),
    RopeScaling(rope_type="llama3", factor=8.0),
    ImageConfig(size=16, resize="pad", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)),
    PromptConfig(template="checkpoint", content="parts", eos_token_ids=(1, 2)),
]
SMALL = MM1Config(
    vision=VisionConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="gelu",
    ),
    connector=SECTIONS[3],
    decoder=DecoderConfig(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        rope_scaling=SECTIONS[5],
        sliding_window=32,
        moe=SECTIONS[4],
    ),
    image=SECTIONS[6],
    prompt=SECTIONS[7],
)


def through_json(config):
    return type(config).from_dict(json.loads(json.dumps(config.to_dict())))


def changed(path, value):
    """SMALL's values with one of them replaced; ``path`` is dotted."""
    values = SMALL.to_dict()
    *sections, field = path.split(".")
    target = values
    for section in sections:
        target = target[section]
    target[field] = value
    return values


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    assert through_json(PRESETS[name]) == PRESETS[name]


@pytest.mark.parametrize("section", [*SECTIONS, SMALL, SMALL.vision, SMALL.decoder])
def test_sections_survive_json(section):
    assert through_json(section) == section
    assert through_json(section).to_dict() == section.to_dict()


def test_a_model_may_hold_any_one_part():
    for part in ("vision", "connector", "decoder"):
        config = MM1Config(**{part: getattr(SMALL, part)})
        assert through_json(config) == config
        assert not config.sees


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("surprise", 1, r"MM1Config: unknown field\(s\) \['surprise'\]; known: "),
        ("vision.colour", 1, r"VisionConfig: unknown field\(s\) \['colour'\]"),
        (
            "connector.kind",
            "resampler",
            r"kind 'resampler' is not one of \['attention",
        ),
        ("connector.kind", [], r"MM1Config.connector: kind \[\] is not one of"),
        ("connector", None, None),
        ("connector", "mlp", r"MM1Config.connector: kind None is not one of"),
        ("vision", [], r"VisionConfig: expected an object, got \[\]"),
        ("vision.norm", "batch", r"VisionConfig.norm: 'batch' is not one of"),
        ("vision.image_size", "16", "VisionConfig.image_size: expected int, got '16'"),
        ("vision.image_size", 16.0, "VisionConfig.image_size: expected int, got 16.0"),
        ("vision.drop_cls", 1, "VisionConfig.drop_cls: expected bool, got 1"),
        ("vision.num_hidden_layers", True, "num_hidden_layers: expected int, got True"),
        ("vision.image_size", 0, r"VisionConfig.image_size: 0 is outside 1..32768"),
        ("vision.num_hidden_layers", 257, r"num_hidden_layers: 257 is outside 1..256"),
        ("vision.image_size", 18, "image_size 18 is not a multiple of patch_size 4"),
        (
            "vision.num_attention_heads",
            5,
            "hidden_size 32 is not a multiple of num_att",
        ),
        ("vision.feature_layer", 0, r"feature_layer: 0 is outside -3..-1"),
        ("vision.feature_layer", -4, r"feature_layer: -4 is outside -3..-1"),
        ("vision.layer_norm_eps", -1e-5, r"layer_norm_eps: -1e-05 is not positive"),
        ("vision.hidden_size", 64, "input_size is 32 but vision.hidden_size is 64"),
        ("vision.drop_cls", False, "vision's features per tile is 17"),
        ("connector.num_features", 15, "num_features: 15 is not a square number"),
        (
            "connector.num_image_tokens",
            5,
            "num_image_tokens: 5 less 2 end tokens is not",
        ),
        ("connector.num_image_tokens", 10**12 + 2, r"num_image_tokens: .* is outside"),
        ("connector.num_eos_tokens", -1, r"num_eos_tokens: -1 is outside 0..32768"),
        (
            "connector.output_size",
            50,
            "output_size is 50 but decoder.hidden_size is 48",
        ),
        ("decoder.vocab_size", 1_000_001, r"vocab_size: 1000001 is outside 1..1000000"),
        ("decoder.hidden_size", -48, r"DecoderConfig.hidden_size: -48 is outside"),
        (
            "decoder.num_key_value_heads",
            3,
            "num_attention_heads 4 is not a multiple of",
        ),
        ("decoder.head_dim", 15, "head_dim: 15 is odd and cannot be rotated"),
        ("decoder.sliding_window", 0, "sliding_window: 0 is not positive"),
        ("decoder.max_position_embeddings", 0, "max_position_embeddings: 0 is not pos"),
        ("decoder.rope_theta", 0.0, "DecoderConfig.rope_theta: 0.0 is not positive"),
        ("decoder.rms_norm_eps", 10**400, "rms_norm_eps: expected a finite number"),
        ("decoder.rope_theta", float("inf"), "rope_theta: expected a finite number"),
        ("decoder.rope_theta", float("nan"), "rope_theta: expected a finite number"),
        ("decoder.hidden_act", "gelu", "experts are SwiGLU; hidden_act 'gelu'"),
        ("decoder.mlp_bias", True, "experts have no biases"),
        ("decoder.rope_scaling.rope_type", "yarn", r"rope_type: 'yarn' is not one of"),
        ("decoder.rope_scaling.factor", 0.0, "RopeScaling.factor: 0.0 is not positive"),
        ("decoder.rope_scaling.high_freq_factor", 1.0, "1.0 is not above low_freq_fac"),
        ("decoder.moe.num_experts", 513, r"num_experts: 513 is outside 1..512"),
        ("decoder.moe.experts_per_token", 5, r"experts_per_token: 5 is outside 1..4"),
        ("decoder.moe.offset", 2, r"MoEConfig.offset: 2 is outside 0..1"),
        ("image.size", 18, "image.size 18 is not a multiple of vision.patch_size 4"),
        ("image.mean", [0.5, 0.5], r"ImageConfig.mean: expected 3 values, got \[0.5"),
        ("image.mean", 0.5, "ImageConfig.mean: expected a list, got 0.5"),
        (
            "image.std",
            [1, 1, 0],
            r"ImageConfig.std: \(1.0, 1.0, 0.0\) must be positive",
        ),
        ("image.resize", "stretch", r"ImageConfig.resize: 'stretch' is not one of"),
        ("prompt.template", "chatml", r"PromptConfig.template: 'chatml' is not one of"),
        ("prompt.image_token_id", 320, "320 is outside the vocabulary of 320"),
        ("prompt.image_token_id", -1, "-1 is outside the vocabulary of 320"),
        ("prompt.image_token", "", "PromptConfig.image_token is empty"),
        (
            "quantization",
            {"bits": 4},
            r"QuantizationConfig: missing field\(s\) \['group",
        ),
    ],
)
def test_a_wrong_value_is_named(path, value, message):
    if message is None:
        assert MM1Config.from_dict(changed(path, value)).connector is None
        return
    with pytest.raises(ConfigError, match=message) as caught:
        MM1Config.from_dict(changed(path, value))
    assert "\n" not in str(caught.value)


def test_a_projector_needs_a_width():
    with pytest.raises(ConfigError, match=r"MLPConfig.hidden_size: 0 is outside"):
        MLPConfig(**SIZES, hidden_size=0)


def test_a_missing_field_is_named():
    values = SMALL.to_dict()
    del values["decoder"]["head_dim"]
    with pytest.raises(
        ConfigError, match=r"DecoderConfig: missing field\(s\) \['head_dim'\]"
    ):
        MM1Config.from_dict(values)


@pytest.mark.parametrize("values", [[], None, "mm1", 3])
def test_a_config_is_an_object(values):
    with pytest.raises(ConfigError, match="MM1Config: expected an object, got"):
        MM1Config.from_dict(values)


def test_a_model_needs_a_part():
    with pytest.raises(ConfigError, match=r"at least one of .* is needed"):
        MM1Config()


def test_image_tokens_need_a_connector():
    with pytest.raises(ConfigError, match="no connector"):
        _ = MM1Config(decoder=SMALL.decoder).num_image_tokens


def test_every_second_layer_is_sparse():
    assert [SMALL.decoder.is_sparse(i) for i in range(4)] == [False, True] * 2


def test_configs_need_no_mlx():
    code = (
        "import sys, mm1_mlx.config, mm1_mlx.presets, mm1_mlx.layout\n"
        "print([m for m in ('mlx', 'transformers', 'PIL') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


STRANGE = [
    None, True, -1, 0, 1, 3, 10**6, 10**18, 10**400, -0.5, 1e308, float("inf"),
    float("nan"), "", "x" * 10_000, "gelu", "\ud800", [], [1], [[]], {}, {"kind": {}},
]  # fmt: skip


def mutate(values, rng):
    """One of the values somewhere in ``values``, replaced, dropped or added."""
    target = values
    while True:
        key = rng.choice(list(target))
        if not (isinstance(target[key], dict) and target[key] and rng.random() < 0.8):
            break
        target = target[key]
    kind = rng.randrange(4)
    if kind == 0:
        del target[key]
    elif kind == 1:
        target[str(rng.random())] = rng.choice(STRANGE)
    else:
        target[key] = rng.choice(STRANGE)


def test_mutated_configs_are_refused_or_valid_at_once():
    rng = random.Random(0)
    refused, slowest = 0, 0.0
    for _ in range(200):
        values = copy.deepcopy(SMALL.to_dict())
        for _ in range(rng.randint(1, 2)):
            mutate(values, rng)
        start = time.thread_time()
        config, message = None, ""
        try:
            config = MM1Config.from_dict(values)
        except ConfigError as error:
            message = str(error)
        if config is None:
            refused += 1
            assert re.fullmatch(r"[A-Za-z0-9]+(Config|Scaling).*[^.]", message)
            assert len(message) < 2000
        else:
            assert MM1Config.from_dict(config.to_dict()) == config
        slowest = max(slowest, time.thread_time() - start)
    assert 100 < refused < 200
    assert slowest < 0.1


@pytest.mark.parametrize(
    ("connector", "tokens"),
    [
        ({"kind": "perceiver", "num_image_tokens": 5, "intermediate_size": 8}, 5),
        ({"kind": "c_abstractor", "num_image_tokens": 6, "num_eos_tokens": 2}, 6),
    ],
)
@pytest.mark.parametrize("merge", ["rows", "unpad"])
def test_rows_of_tiles_need_a_square_of_image_tokens(connector, tokens, merge):
    values = SMALL.to_dict()
    sizes = ("input_size", "num_features", "output_size")
    joints = {key: values["connector"][key] for key in sizes}
    values["connector"] = joints | connector | {"newline": merge == "unpad"}
    values["image"]["tiling"] = {"kind": "anyres", "grids": [[1, 2]], "merge": merge}
    message = (
        f"merges by '{merge}', which needs a square of image tokens .* not {tokens}"
    )
    with pytest.raises(ConfigError, match=message):
        MM1Config.from_dict(values)
    values["image"]["tiling"]["merge"] = "flat"
    values["connector"]["newline"] = False
    assert MM1Config.from_dict(values).num_image_tokens == tokens
