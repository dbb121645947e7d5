"""Connectors pool, convolve and count as their configs say."""

import typing

import mlx.core as mx
import numpy as np
import pytest

from mm1_mlx import config as config_module
from mm1_mlx.config import (
    AttentionPoolConfig,
    AveragePoolConfig,
    CAbstractorConfig,
    LinearConfig,
    MLPConfig,
    PerceiverConfig,
)
from mm1_mlx.models.c_abstractor import Bottleneck, CAbstractor, DepthwiseConv
from mm1_mlx.models.connector import CONNECTORS, AveragePoolConnector
from mm1_mlx.models.resample import pooling_matrix, resample

SIZES = {"input_size": 24, "num_features": 49, "output_size": 20}
GRIDS = [(16, 12), (24, 12), (27, 12), (27, 8), (48, 12)]


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make(config, reinitialise):
    return reinitialise(CONNECTORS[config.kind](config))


def test_every_kind_of_config_has_a_connector():
    configs = typing.get_args(config_module.ConnectorConfig)
    kinds = {typing.get_args(typing.get_type_hints(c)["kind"])[0] for c in configs}
    assert set(CONNECTORS) == kinds


@pytest.mark.reference
@pytest.mark.parametrize(("size", "bins"), GRIDS)
def test_pooling_equals_torchs_resample(size, bins):
    torch = pytest.importorskip("torch")
    x = random(2, size, size, 5)
    pool = torch.nn.AdaptiveAvgPool2d(bins)
    expected = pool(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    result = resample(mx.array(x), pooling_matrix(size, bins))
    np.testing.assert_allclose(np.array(result), expected.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "bins"), [*GRIDS, (7, 3), (5, 5)])
def test_pooling_means_the_cells_of_every_bin(size, bins):
    x = random(1, size, size, 2)
    result = np.array(resample(mx.array(x), pooling_matrix(size, bins)))
    edges = [(i * size // bins, -(-(i + 1) * size // bins)) for i in range(bins)]
    for i, (top, bottom) in enumerate(edges):
        for j, (left, right) in enumerate(edges):
            mean = x[0, top:bottom, left:right].mean(axis=(0, 1))
            np.testing.assert_allclose(result[0, i, j], mean, rtol=0, atol=1e-6)


@pytest.mark.reference
def test_depthwise_convolution_equals_torchs_grouped_one(assert_close):
    torch = pytest.importorskip("torch")
    convolution = DepthwiseConv(6)
    x, weight = random(2, 5, 7, 6), np.array(convolution.weight)
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(x).permute(0, 3, 1, 2),
        torch.from_numpy(weight).permute(0, 3, 1, 2),
        padding=1,
        groups=6,
    ).permute(0, 2, 3, 1)
    assert_close(convolution(mx.array(x)), expected.numpy(), "op")


def test_depthwise_convolution_keeps_channels_apart():
    convolution, x = DepthwiseConv(6), random(1, 5, 5, 6)
    changed = x.copy()
    changed[..., 2] += 1
    difference = np.array(convolution(mx.array(changed)) - convolution(mx.array(x)))
    assert np.abs(difference[..., [0, 1, 3, 4, 5]]).max() == 0
    assert np.abs(difference[..., 2]).max() > 0.01


@pytest.mark.parametrize(
    "config",
    [
        LinearConfig(**SIZES),
        LinearConfig(**SIZES, bias=False),
        MLPConfig(**SIZES, hidden_size=40),
        MLPConfig(**SIZES, hidden_size=40, hidden_act="silu", bias=False),
        AveragePoolConfig(**SIZES, num_image_tokens=9),
        AveragePoolConfig(**SIZES, num_image_tokens=9, bias=False),
        CAbstractorConfig(**SIZES, num_image_tokens=16, hidden_size=12),
        CAbstractorConfig(**SIZES, num_image_tokens=9, hidden_size=24, depth=1),
        CAbstractorConfig(**SIZES, num_image_tokens=9, hidden_size=12, mlp_depth=1),
        CAbstractorConfig(**SIZES, num_image_tokens=9, hidden_size=12, mlp_depth=3),
        CAbstractorConfig(**SIZES, num_image_tokens=9, hidden_size=12, prenorm=True),
        CAbstractorConfig(
            **SIZES, num_image_tokens=11, hidden_size=12, num_eos_tokens=2
        ),
        CAbstractorConfig(
            **SIZES, num_image_tokens=9, hidden_size=12, position_embedding=False
        ),
        MLPConfig(**SIZES, hidden_size=18, pooled_tokens=16),
        AttentionPoolConfig(**SIZES, num_image_tokens=7, num_attention_heads=4),
        PerceiverConfig(**SIZES, num_image_tokens=7, intermediate_size=30, depth=2),
    ],
)
def test_a_tile_becomes_as_many_image_tokens_as_the_config_says(
    config, reinitialise, assert_close
):
    connector = make(config, reinitialise)
    features = mx.array(random(3, 49, 24))
    image_tokens = connector(features)
    assert image_tokens.shape == (3, config.image_tokens(49), 20)
    for i in range(3):
        assert_close(connector(features[i : i + 1])[0], image_tokens[i])


def c_abstractor(**changes):
    return CAbstractorConfig(**SIZES, hidden_size=12, **changes)


def test_options_add_their_tensors_and_nothing_else(reinitialise):
    def names(config):
        return set(dict(make(config, reinitialise).parameters()))

    plain = names(c_abstractor(num_image_tokens=9))
    assert plain == {"position_embedding", "stage1", "stage2", "readout"}
    assert names(c_abstractor(num_image_tokens=9, prenorm=True)) - plain == {"prenorm"}
    eos = names(c_abstractor(num_image_tokens=11, num_eos_tokens=2))
    assert eos - plain == {"eos_tokens"}
    no_position = names(c_abstractor(num_image_tokens=9, position_embedding=False))
    assert plain - no_position == {"position_embedding"}


def test_depth_counts_the_blocks_of_each_stage(reinitialise):
    connector = make(c_abstractor(num_image_tokens=9, depth=2), reinitialise)
    assert (len(connector.stage1), len(connector.stage2)) == (2, 2)
    assert ["shortcut" in block for block in connector.stage1] == [True, False]
    assert [layer.weight.shape for layer in connector.readout] == [(20, 12), (20, 20)]


def test_end_tokens_stand_last_and_are_the_same_for_every_tile(reinitialise):
    connector = make(c_abstractor(num_image_tokens=11, num_eos_tokens=2), reinitialise)
    image_tokens = connector(mx.array(random(2, 49, 24)))
    for tile in image_tokens:
        assert mx.array_equal(tile[9:], connector.eos_tokens)


def test_the_position_embedding_is_added_to_the_features(reinitialise):
    with_it = make(c_abstractor(num_image_tokens=9), reinitialise)
    config = c_abstractor(num_image_tokens=9, position_embedding=False)
    without = CAbstractor(config)
    parameters = dict(with_it.parameters())
    position = parameters.pop("position_embedding")
    without.update(parameters)
    features = mx.array(random(1, 49, 24))
    assert mx.array_equal(with_it(features), without(features + position))


def test_the_layout_of_the_picture_is_kept(reinitialise, assert_close):
    config = AveragePoolConfig(**SIZES, num_image_tokens=49)
    connector = reinitialise(AveragePoolConnector(config))
    features = mx.array(random(1, 49, 24))
    assert_close(connector(features), connector.linear(features), "op")


def test_the_gate_of_a_block_is_as_wide_as_a_quarter_of_its_input():
    block = Bottleneck(40, 16, 1e-5)
    assert block.se.fc1.weight.shape == (10, 16)
    assert block.se.fc2.weight.shape == (16, 10)
    assert "shortcut" in block
    assert "shortcut" not in Bottleneck(16, 16, 1e-5)


@pytest.mark.reference
@pytest.mark.parametrize("grid", [10, 5])
def test_the_c_abstractor_s_positions_follow_the_tiles(
    grid, reinitialise, assert_close
):
    torch = pytest.importorskip("torch")
    connector = make(c_abstractor(num_image_tokens=9), reinitialise)
    table = np.array(connector.position_embedding)  # of a 7 x 7 grid
    stretched = torch.nn.functional.interpolate(
        torch.from_numpy(table.reshape(1, 7, 7, -1)).permute(0, 3, 1, 2),
        size=(grid, grid),
        mode="bicubic",
        antialias=True,
    )
    positions = stretched.permute(0, 2, 3, 1).reshape(grid**2, -1).numpy()
    features = random(2, grid**2, 24)
    followed = connector(mx.array(features))
    connector.position_embedding = mx.array(positions)
    assert followed.shape == (2, 9, 20)
    assert_close(followed, connector(mx.array(features)))
