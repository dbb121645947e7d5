"""Resolution modes are spelled in one word, and fit the encoder or are refused."""

import pytest

from mm1_mlx.config import DynamicTiling, SplitTiling
from mm1_mlx.errors import ConfigError
from mm1_mlx.presets import PRESETS
from mm1_mlx.resolution import PAPER_MODES, name_mode, with_resolution

MODEL = PRESETS["mm1-3b"]


@pytest.mark.parametrize(
    ("mode", "size", "tiling"),
    [
        ("378", 378, None),
        ("896", 896, None),
        ("2x672", 672, SplitTiling(grid=2)),
        ("3x448", 448, SplitTiling(grid=3)),
        ("4-9x672", 672, DynamicTiling()),
        ("1-16x672", 672, DynamicTiling(min_tiles=1, max_grid_tiles=16)),
    ],
)
def test_a_mode_says_tiles_and_their_size(mode, size, tiling):
    image = with_resolution(MODEL, mode).image
    assert image is not None
    assert (image.size, image.tiling) == (size, tiling)
    assert name_mode(image) == mode


def test_every_mode_of_the_paper_fits_its_encoder():
    for mode in PAPER_MODES:
        assert with_resolution(MODEL, mode).vision == MODEL.vision


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("", "resolution '' is not one; expected SIZE for one tile"),
        ("large", "resolution 'large' is not one"),
        ("-672", "resolution '-672' is not one"),
        ("380", "380 pixels are not a multiple of the encoder's patches of 14"),
        ("0x672", r"SplitTiling.grid: 0 is outside 1..8"),
        ("9-4x672", r"DynamicTiling.min_tiles: 9 is outside 1..4"),
        ("4-999x672", r"max_grid_tiles: 999 is outside 1..64"),
        ("99990", "ImageConfig.size: 99990 is outside 1..32768"),
        ("9" * 5000, "resolution '999"),
        ("\u0663\u0663\u0666", "is not one; expected SIZE"),
        ("8204", "1 tiles of 8204 x 8204 pixels a picture are more than"),
        ("2002", "tiles of 2002 pixels have 20449 patches, more than 16384"),
    ],
)
def test_a_mode_that_is_none_is_named(mode, message):
    with pytest.raises(ConfigError, match=message):
        with_resolution(MODEL, mode)


def test_a_model_without_eyes_has_no_resolution(make_config):
    config = make_config(vision=None, connector=None, image=None)
    with pytest.raises(ConfigError, match="the model takes no pictures"):
        with_resolution(config, "672")


def test_a_mode_keeps_what_its_tiling_says_beside_the_numbers(make_config):
    tiling = {"kind": "split", "overview": "last", "indicators": "seps"}
    config = make_config(image={"tiling": tiling})
    image = with_resolution(config, "3x32").image
    assert image.tiling == SplitTiling(grid=3, overview="last", indicators="seps")
    tiling = {"kind": "dynamic", "max_pictures": 5, "overview": "first"}
    config = make_config(image={"tiling": tiling})
    image = with_resolution(config, "2-6x16").image
    expected = DynamicTiling(
        min_tiles=2, max_grid_tiles=6, max_pictures=5, overview="first"
    )
    assert image.tiling == expected


def test_a_cut_keeps_its_share_of_the_picture(make_config):
    config = make_config(image={"resize": "crop", "crop_from": 18})
    assert with_resolution(config, "16").image == config.image
    assert with_resolution(config, "32").image.crop_from == 36
