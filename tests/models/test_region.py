"""Ferret's region sampler: its size, where it looks, and which points it keeps."""

import mlx.core as mx
import numpy as np
import pytest

from mm1_mlx.config import RegionConfig
from mm1_mlx.errors import ConfigError
from mm1_mlx.layout import Picture
from mm1_mlx.models import MM1
from mm1_mlx.models.region import (
    RegionSampler,
    farthest,
    nearest,
    region_map,
    sample,
)


def points(count, seed=0):
    return np.random.default_rng(seed).random((count, 2)).astype(np.float32)


def picture_of(places, *regions):
    tiles = tuple(np.zeros((4, 4, 3), np.float32) for _ in places or "a")
    return Picture(tiles, (8, 8), "", places, regions=regions)


SMALL = {"num_points": 40, "num_sub_points": (12, 5), "num_neighbours": 4}


def sampler(reinitialise, **changes):
    config = RegionConfig(input_size=6, output_size=10, **(SMALL | changes))
    return reinitialise(RegionSampler(config))


def test_parameters_are_as_many_as_ferret_s(parameter_count):
    config = RegionConfig(input_size=1024, output_size=4096)
    assert parameter_count(RegionSampler(config)) == 44_069_900


def test_tensors_are_named_by_their_paths(make_config):
    region = {"input_size": 32, "output_size": 48} | SMALL
    model = MM1(make_config(region=region))
    assert model.region.stages[1].agg_proj.weight.shape == (32, 68)
    names = {name for name in model.tensors() if name.startswith("region.")}
    assert "region.stages.1.diff_proj.bias" in names
    assert len(names) == 2 * 6 + 4


def test_every_region_has_a_token_of_its_own(reinitialise, assert_close):
    model, x = sampler(reinitialise), mx.random.normal((16, 6))
    both = model([x], picture_of((), points(40), points(40, 1)))
    assert both.shape == (2, 10)
    for i in range(2):
        alone = model([x], picture_of((), points(40, i)))
        assert_close(both[i], alone[0])
    assert not mx.allclose(both[0], both[1], atol=1e-3)


def test_features_are_read_at_the_transposed_place_unless_switched_off(reinitialise):
    x = mx.random.normal((4, 4, 6))
    where = points(40)
    mirrored = np.ascontiguousarray(where[:, ::-1])
    # As measured of Ferret's code: x = .9375, y = .208 reads row .9375, column .208.
    there = np.array([[1, 1 / 3]], np.float32)
    assert mx.allclose(sample(x, there, transposed=True)[0], x[3, 1], atol=1e-6)
    assert mx.allclose(sample(x, there, transposed=False)[0], x[1, 3], atol=1e-6)
    quirk = sampler(reinitialise)
    plain = sampler(reinitialise, transposed=False)
    flat, turned = x.reshape(16, 6), x.transpose(1, 0, 2).reshape(16, 6)
    picture = picture_of((), where)
    assert mx.allclose(quirk([flat], picture), plain([turned], picture), atol=1e-5)
    assert not mx.allclose(quirk([flat], picture), plain([flat], picture), atol=1e-3)
    # Positions among the features are not transposed.
    other = picture_of((), mirrored)
    assert not mx.allclose(quirk([flat], picture), plain([flat], other), atol=1e-3)


def test_features_between_positions_are_mixed_and_corners_lie_on_corners():
    x = mx.arange(12, dtype=mx.float32).reshape(3, 4, 1)
    where = np.array([[0, 0], [1, 1], [0.5, 0.5], [0.25, 1]], np.float32)
    read = sample(x, where, transposed=False)[:, 0]
    assert mx.allclose(read, mx.array([0, 11, 5.5, 8.75]))


def test_a_tiled_picture_s_map_is_its_tiles_and_its_overview_stretched():
    base, first, second = (mx.random.normal((4, 5)) for _ in range(3))
    places = ((0, 0), (1, 1), (1, 2))
    grid = region_map([base, first, second], picture_of(places))
    assert grid.shape == (2, 4, 5)
    for row in range(2):
        for column in range(4):
            tile = (first, second)[column // 2][2 * row + column % 2]
            # Nearest: each feature of the overview covers two columns.
            expected = base[2 * row + column // 2] + tile
            assert mx.allclose(grid[row, column], expected)
    last = region_map([first, second, base], picture_of((*places[1:], places[0])))
    assert mx.allclose(grid, last)


def test_anchors_are_far_apart_and_the_first_point_is_the_first():
    where = np.array([[0, 0], [0.1, 0], [1, 1], [0, 1], [1, 0.9]], np.float32)
    assert farthest(where, 4).tolist() == [0, 2, 3, 4]
    assert farthest(np.zeros((3, 2), np.float32), 2).tolist() == [0, 0]


def test_neighbours_are_the_nearest_themselves_among_them():
    where = points(50)
    near = nearest(where, where[[3, 7]], 6)
    assert near[:, 0].tolist() == [3, 7]
    apart = np.linalg.norm(where[None] - where[[3, 7]][:, None], axis=-1)
    for i in range(2):
        assert set(near[i]) == set(np.argsort(apart[i])[:6])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image": {"resize": "crop"}},
            "image.resize 'crop' or a tiling that pads wou",
        ),
        (
            {"image": {"tiling": {"kind": "dynamic"}}},
            "or a tiling that pads would move",
        ),
        ({"image": {"tiling": {"kind": "split"}}}, None),
        ({"region": {"input_size": 31}}, "region.input_size is 31 but vision.hidden_s"),
        ({"region": {"num_neighbours": 13}}, "num_neighbours: 13 is outside 1..12"),
        ({"region": {"num_points": 4097}}, "num_points: 4097 is outside 1..4096"),
    ],
)
def test_maps_that_do_not_lie_on_the_picture_are_refused(changes, message, make_config):
    region = {"input_size": 32, "output_size": 48} | SMALL | changes.pop("region", {})
    if message is None:
        assert make_config(region=region, **changes).region
        return
    with pytest.raises(ConfigError, match=message):
        make_config(region=region, **changes)


def test_a_model_without_a_sampler_refuses_regions(tiny_model):
    picture = Picture(
        (np.zeros((16, 16, 3), np.float32),), (16, 16), "", regions=(points(4),)
    )
    with pytest.raises(ConfigError, match="has no region sampler; refer to boxes in"):
        tiny_model.encode([picture])


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_stays(kind, reinitialise, assert_close):
    # A small region: its points differ in their last bits.
    model, picture = sampler(reinitialise), picture_of((), 0.7 + points(40) / 50)
    x, dtype = mx.random.normal((16, 6)), getattr(mx, kind)
    # Both of the rounded weights, so that only what is computed is compared.
    model.set_dtype(dtype)
    half = model([x.astype(dtype)], picture)
    model.set_dtype(mx.float32)
    full = model([x.astype(dtype).astype(mx.float32)], picture)
    assert half.dtype == dtype
    assert_close(half, full, kind)
