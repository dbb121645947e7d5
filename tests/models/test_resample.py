"""Positions are stretched as PyTorch interpolates them, by either kernel."""

import mlx.core as mx
import numpy as np
import pytest

from mm1_mlx.models.resample import stretch

# Patches along a side of 224, 336 and 378 pixels, and of what they are stretched to.
TRAINED = {224: 16, 336: 24, 378: 27}
LARGER = {448: 32, 560: 40, 672: 48, 896: 64}


def table(grid, channels=3):
    rng = np.random.default_rng(grid)
    return rng.standard_normal((grid * grid, channels)).astype(np.float32)


@pytest.mark.reference
@pytest.mark.parametrize("target", [*LARGER.values(), 16, 9])
@pytest.mark.parametrize("grid", TRAINED.values())
@pytest.mark.parametrize("interpolation", ["bicubic", "bicubic_antialias"])
def test_stretching_is_pytorch_s_bicubic(grid, target, interpolation, assert_close):
    torch = pytest.importorskip("torch")
    positions = table(grid)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(positions.reshape(1, grid, grid, 3).transpose(0, 3, 1, 2)),
        size=(target, target),
        mode="bicubic",
        align_corners=False,
        antialias=interpolation == "bicubic_antialias",
    )
    expected = expected.permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    assert_close(stretch(mx.array(positions), target, interpolation), expected, "op")


@pytest.mark.parametrize("interpolation", ["bicubic", "bicubic_antialias"])
def test_the_same_grid_is_left_as_it_is(interpolation):
    positions = mx.array(table(16))
    assert mx.array_equal(stretch(positions, 16, interpolation), positions)


def test_the_kernels_differ_where_grids_grow():
    """By tenths on positions of unit size, so the choice is part of a config."""
    positions = mx.array(table(27, 64))
    results = [stretch(positions, 48, x) for x in ("bicubic", "bicubic_antialias")]
    assert mx.abs(results[0] - results[1]).max() > 0.2


@pytest.mark.parametrize("interpolation", ["bicubic", "bicubic_antialias"])
def test_a_constant_stays_constant(interpolation, assert_close):
    result = stretch(mx.ones((24 * 24, 2)), 40, interpolation)
    assert_close(result, np.ones((1600, 2)), "op")
