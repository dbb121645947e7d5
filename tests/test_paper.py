"""The twelve facts that can be computed from the papers, each checked against the code."""

import math

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mm1_mlx.checkpoint import model_shapes
from mm1_mlx.config import (
    CAbstractorConfig,
    DynamicTiling,
    MM1Config,
    SplitTiling,
    VisionConfig,
)
from mm1_mlx.image import load_picture
from mm1_mlx.layout import Picture, most_picture_tokens
from mm1_mlx.messages import Region
from mm1_mlx.models.moe import load_balance_loss, router_z_loss
from mm1_mlx.models.resample import pooling_matrix, resample
from mm1_mlx.presets import PRESETS, VIT_H_14_378, VIT_L_14_336
from mm1_mlx.regions import refer
from mm1_mlx.resolution import with_resolution
from mm1_mlx.tiling import choose_grid, grids_between
from mm1_mlx.train import paper
from mm1_mlx.train.data.mixture import SPECS, read_mixture
from mm1_mlx.train.optimizer import schedule
from mm1_mlx.train.stages import plan
from mm1_mlx.video import NUM_FRAMES


def count(config):
    shapes = model_shapes(config).values()
    return sum(math.prod(shape) for shape in shapes)


def vit(of, size, projection=None):
    values = of.to_dict() | {"image_size": size, "projection_size": projection}
    return count(MM1Config(vision=VisionConfig.from_dict(values)))


def test_1_encoders_have_the_published_parameters():
    assert vit(VIT_H_14_378, 378) == 631_371_520
    assert vit(VIT_H_14_378, 378, 1024) == 632_682_240
    assert vit(VIT_H_14_378, 224, 1024) == 632_076_800
    assert vit(VIT_L_14_336, 336) == 303_507_456
    assert vit(VIT_L_14_336, 336, 768) == 304_293_888


def test_2_patches_per_tile():
    sides = (224, 336, 378, 448, 560, 672, 896)
    patches = [(side // 14) ** 2 for side in sides]
    assert patches == [256, 576, 729, 1024, 1600, 2304, 4096]
    for side, expected in zip(sides, patches, strict=True):
        values = VIT_H_14_378.to_dict() | {"image_size": side}
        assert VisionConfig.from_dict(values).num_patches == expected


def test_3_image_tokens_per_picture():
    model = PRESETS["mm1-3b"]
    tokens = {
        mode: most_picture_tokens(with_resolution(model, mode))
        for mode in ("378", "2x672", "4-9x672")
    }
    assert tokens == {"378": 144, "2x672": 720, "4-9x672": 1440}
    assert NUM_FRAMES * tokens["378"] == 3456
    # Of sixteen in one sequence of 4096, as in pre-training.
    assert 16 * tokens["378"] == 2304


@pytest.mark.parametrize(
    ("parameters", "rate"),
    [
        *((3e9, 5.834e-5), (7e9, 4.082e-5), (3e10, 2.211e-5)),
        *((1.2e9, 8.583e-5), (2.9e9, 5.918e-5), (6.4e9, 4.239e-5)),
    ],
)
def test_4_the_learning_rate_falls_with_the_size(parameters, rate):
    peak = paper.peak_learning_rate(parameters)
    assert peak == pytest.approx(rate, rel=1e-3)
    config = planned("pretrain", parameters)
    assert config.learning_rate == peak
    # Lambda is a tenth of eta.
    assert config.weight_decay * peak == pytest.approx(peak / 10)


def planned(stage, parameters=3e9, **options):
    """The run of a command on as many rows as the paper's steps take."""
    steps = {"pretrain": 200_000, "sft": 10_000}
    return plan(
        stage,
        {"steps": steps[stage]},
        rows=1,
        parts=("vision", "connector", "decoder"),
        packed=(),
        parameters=parameters,
        precision="float32",
        **options,
    )


def test_5_the_mixture_of_pre_training():
    datasets = read_mixture(SPECS / "pretraining-45-45-10.json").datasets
    assert [row.weight for row in datasets] == [45, 45, 10]


def test_6_the_supervised_mixture():
    weights = {x.name: x.weight for x in read_mixture(SPECS / "mm1-sft.json").datasets}
    assert sum(weights.values()) == 1448
    assert len(weights) == 17
    assert weights["SynthDog-EN"] / 1448 == pytest.approx(0.345, abs=5e-4)


@pytest.mark.parametrize(
    ("features", "inputs", "outputs", "parameters"),
    [
        (576, 1024, 4096, 37_398_016),
        (256, 1024, 4096, 37_070_336),
        (729, 1280, 3072, 31_056_704),
        (729, 1280, 7168, 77_202_240),
    ],
)
def test_7_the_c_abstractor(features, inputs, outputs, parameters):
    config = CAbstractorConfig(
        input_size=inputs,
        num_features=features,
        output_size=outputs,
        num_image_tokens=144,
    )
    assert count(MM1Config(connector=config)) == parameters


def test_7_adaptive_pooling_is_a_matrix_on_either_side():
    bins = [np.flatnonzero(row) for row in np.array(pooling_matrix(27, 12))]
    spans = [(int(b[0]), int(b[-1]) + 1) for b in bins]
    assert spans == [
        *((0, 3), (2, 5), (4, 7), (6, 9), (9, 12), (11, 14)),
        *((13, 16), (15, 18), (18, 21), (20, 23), (22, 25), (24, 27)),
    ]
    x = np.random.default_rng(0).standard_normal((1, 27, 27, 3)).astype(np.float32)
    pooled = np.array(resample(mx.array(x), pooling_matrix(27, 12)))
    for i, (top, bottom) in enumerate(spans):
        for j, (left, right) in enumerate(spans):
            mean = x[0, top:bottom, left:right].mean(axis=(0, 1))
            np.testing.assert_allclose(pooled[0, i, j], mean, atol=1e-6)


def test_8_mixtures_of_experts():
    for name, total, rounded in (
        ("mm1-3b-moe", 63.78, 64),
        ("mm1-7b-moe", 47.01, 47),
    ):
        shapes = model_shapes(PRESETS[name])
        decoder = sum(
            math.prod(shape)
            for key, shape in shapes.items()
            if key.startswith("decoder.") and "embed_tokens" not in key
        )
        assert decoder / 1e9 == pytest.approx(total, abs=5e-3)
        assert round(decoder / 1e9) == rounded
    # Upcycled = dense is in convert/test_upcycle.py.


@pytest.mark.parametrize(("experts", "expected"), [(64, 17.30), (32, 12.01)])
def test_8_the_losses_of_a_gate_that_does_not_choose(experts, expected):
    logits = mx.zeros((1, 6, experts))
    real = mx.ones((1, 6), mx.bool_)
    assert router_z_loss(logits, real).item() == pytest.approx(expected, abs=5e-3)
    # Uniform probabilities make it 1 whichever expert is first.
    assert load_balance_loss(logits, real).item() == pytest.approx(1, abs=1e-6)


def test_9_the_schedules():
    config = planned("pretrain")
    rate = schedule(config, config.learning_rate)
    peak = config.learning_rate
    assert rate(mx.array(2000)).item() == pytest.approx(peak, rel=1e-5)
    assert rate(mx.array(200_000)).item() == pytest.approx(peak / 10, rel=1e-5)
    assert rate(mx.array(1000)).item() == pytest.approx(peak / 2, rel=1e-5)
    tuned = planned("sft", full=True)
    rate = schedule(tuned, tuned.learning_rate)
    assert rate(mx.array(0)).item() == pytest.approx(1e-5, rel=1e-5)
    assert rate(mx.array(tuned.steps)).item() == pytest.approx(0, abs=1e-12)


def test_10_dynamic_splitting():
    assert len(grids_between(4, 9)) == 18
    assert choose_grid((1344, 1344), 672, DynamicTiling()) == (2, 2)
    assert SplitTiling().max_tiles == 5
    config = with_resolution(PRESETS["mm1-3b"], "4-9x672").image
    assert config is not None
    # 1344 x 1344 fills four tiles without padding: all of it is white.
    white = load_picture(Image.new("RGB", (1344, 1344), "white"), config)
    assert white.grid == (2, 2)
    lightest = (1 - np.array(config.mean)) / np.array(config.std)
    for tile in white.tiles:
        assert np.allclose(tile, lightest, atol=1e-5)
    # The largest picture that is not scaled down.
    large = load_picture(Image.new("RGB", (2016, 2016)), config)
    tiles = [
        t for t, place in zip(large.tiles, large.places, strict=True) if any(place)
    ]
    assert sum(tile.shape[0] * tile.shape[1] for tile in tiles) == 4_064_256


def test_11_a_box_counts_a_thousand_steps_along_either_side():
    picture = Picture((), (640, 480), "")
    config = PRESETS["mm1-3b"]
    turns = [("user", [None, Region("box", [100, 50, 300, 200], 0)])]
    ((_, parts),), _ = refer(turns, [picture], config)
    assert parts == [None, "[156, 104, 468, 416]"]


@pytest.mark.parametrize(
    ("width", "heads", "parameters"),
    [(1536, 12, 680_535_552), (2048, 16, 1_209_370_624), (3072, 24, 2_720_025_600)],
)
def test_12_aim_has_the_published_parameters(width, heads, parameters):
    config = VisionConfig(
        image_size=224,
        patch_size=14,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=24,
        num_attention_heads=heads,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        class_token=False,
        position="sincos",
        patch_bias=True,
        patch_norm=True,
        pre_norm=False,
        attention_bias=False,
        mlp_bias=False,
    )
    assert count(MM1Config(vision=config)) == parameters
