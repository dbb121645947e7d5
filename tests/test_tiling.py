"""Large pictures become the tiles that MM1, MM1.5 and LLaVA-NeXT make of them."""

import numpy as np
import pytest
from PIL import Image

from mm1_mlx.config import AnyresTiling, DynamicTiling, ImageConfig, SplitTiling
from mm1_mlx.errors import PromptError
from mm1_mlx.image import Frame, Limits, load_picture, load_pictures
from mm1_mlx.layout import Picture, count_picture_tokens, indicator_texts
from mm1_mlx.presets import CLIP_MEAN, CLIP_STD, PRESETS
from mm1_mlx.resolution import with_resolution
from mm1_mlx.tiling import choose_grid, choose_resolution, grids_between

# MM1.5, section 3.5: every (rows, columns) of 4 to 9 tiles.
GRIDS = {
    *((1, 4), (2, 2), (4, 1), (1, 5), (5, 1), (1, 6), (2, 3), (3, 2), (6, 1)),
    *((1, 7), (7, 1), (1, 8), (2, 4), (4, 2), (8, 1), (1, 9), (3, 3), (9, 1)),
}
LLAVA_NEXT = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def image_config(size, tiling, resize="squash"):
    # A mean of 0 and a deviation of 1: pixels can be read off.
    return ImageConfig(
        size=size, resize=resize, mean=(0, 0, 0), std=(1, 1, 1), tiling=tiling
    )


def noise(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def bytes_of(tile):
    return np.rint(tile * 255).astype(int)


def test_four_to_nine_tiles_have_eighteen_grids():
    grids = grids_between(4, 9)
    assert len(grids) == 18
    assert set(grids) == GRIDS
    assert len(grids_between(4, 16)) == 45


# Worked out by hand from equation 1, tiles of 672 pixels: (width, height) -> (rows, columns).
CHOICES = [
    # Covered without scaling down: the grid with the least padding.
    ((1344, 1344), (2, 2)),
    ((672, 672), (2, 2)),
    ((300, 200), (2, 3)),
    ((200, 300), (3, 2)),
    ((1000, 1000), (2, 2)),
    ((1345, 1345), (3, 3)),
    ((2016, 2016), (3, 3)),
    ((2016, 1344), (2, 3)),
    ((1344, 2016), (3, 2)),
    ((2688, 672), (1, 4)),
    ((672, 2688), (4, 1)),
    ((100, 900), (9, 1)),
    ((900, 100), (1, 9)),
    ((640, 480), (2, 3)),
    ((1920, 1080), (2, 4)),
    ((2500, 1250), (2, 4)),
    # Too large for every grid: the one in which the picture stays largest.
    ((4000, 4000), (3, 3)),
    ((8000, 4000), (2, 4)),
    ((3000, 12000), (4, 1)),
    ((70000, 10000), (1, 7)),
]


@pytest.mark.parametrize(("size", "grid"), CHOICES)
def test_the_grid_follows_the_pictures_shape(size, grid):
    assert choose_grid(size, 672, DynamicTiling()) == grid


@pytest.mark.parametrize(("size", "grid"), CHOICES)
def test_the_choice_is_the_best_by_the_rule_itself(size, grid):
    """Equation 1 written down once more, over all grids."""
    width, height = size

    def placed(rows, columns):
        scale = min(rows * 672 / height, columns * 672 / width)
        return scale * height, scale * width

    covers = {}
    keeps = {}
    for rows, columns in GRIDS:
        h, w = placed(rows, columns)
        padding = rows * columns * 672**2 - h * w
        if h >= height * (1 - 1e-12) and w >= width * (1 - 1e-12):
            covers[rows, columns] = padding
        keeps[rows, columns] = h * w
    if covers:
        assert covers[grid] == pytest.approx(min(covers.values()))
    else:
        assert keeps[grid] == pytest.approx(max(keeps.values()))


def test_nine_tiles_of_672_are_four_megapixels():
    assert 9 * 672**2 == 4_064_256


def test_split_is_the_large_picture_cut_and_an_overview():
    photo = noise(70, 50)
    picture = load_picture(photo, image_config(20, SplitTiling()))
    assert picture.places == ((0, 0), (1, 1), (1, 2), (2, 1), (2, 2))
    assert picture.grid == (2, 2)
    large = np.asarray(photo.resize((40, 40), Image.Resampling.BICUBIC))
    small = np.asarray(photo.resize((20, 20), Image.Resampling.BICUBIC))
    assert np.array_equal(bytes_of(picture.tiles[0]), small)
    for tile, (row, column) in zip(picture.tiles[1:], picture.places[1:], strict=True):
        top, left = 20 * (row - 1), 20 * (column - 1)
        expected = large[top : top + 20, left : left + 20]
        assert np.array_equal(bytes_of(tile), expected)


@pytest.mark.parametrize(
    "tiling", [SplitTiling(grid=3, overview="last"), DynamicTiling()]
)
def test_the_overview_may_come_last(tiling):
    picture = load_picture(noise(60, 60), image_config(20, tiling))
    assert picture.places[-1] == (0, 0)
    assert picture.places[0] == (1, 1)
    assert len(picture.tiles) == len(picture.places)
    small = noise(60, 60).resize((20, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(bytes_of(picture.tiles[-1]), np.asarray(small))


def test_dynamic_keeps_the_shape_and_pads_with_the_mean():
    config = ImageConfig(
        size=20, resize="pad", mean=CLIP_MEAN, std=CLIP_STD, tiling=DynamicTiling()
    )
    # 70 x 20 in a grid of 1 x 4: 80 x 23 fits by its width; scaled 8/7, padded above.
    picture = load_picture(Image.new("RGB", (70, 17), "white"), config)
    assert picture.grid == (1, 4)
    white = (1 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    first = picture.tiles[0]
    assert np.allclose(first[10], white, atol=1e-5)
    # 17 * 80 / 70 = 19.4 rows of picture, of 20.
    assert np.abs(first[-1]).max() < 0.02


def test_a_single_dynamic_tile_needs_no_overview():
    tiling = DynamicTiling(min_tiles=1, max_grid_tiles=4)
    picture = load_picture(noise(18, 18), image_config(20, tiling))
    assert len(picture.tiles) == 1
    assert picture.places == ()


def test_more_pictures_than_the_tiling_allows_are_not_split():
    config = image_config(20, DynamicTiling(max_pictures=2))
    photos = [noise(60, 60, seed) for seed in range(3)]
    assert [len(p.tiles) for p in load_pictures(photos[:2], config)] == [10, 10]
    assert [len(p.tiles) for p in load_pictures(photos, config)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("tiled", "tiles"),
    [(None, [5, 5, 5]), (2, [1, 5, 5]), (0, [1, 1, 1]), (9, [5] * 3)],
)
def test_only_the_last_pictures_may_be_split(tiled, tiles):
    config = image_config(20, SplitTiling())
    photos = [noise(60, 60, seed) for seed in range(3)]
    pictures = load_pictures(photos, config, tiled=tiled)
    assert [len(picture.tiles) for picture in pictures] == tiles


def test_frames_are_never_split():
    picture = load_picture(Frame(noise(60, 60)), image_config(20, SplitTiling()))
    assert picture.kind == "frame"
    assert len(picture.tiles) == 1


@pytest.mark.parametrize(
    ("mode", "size", "tokens"),
    [
        *((str(side), (900, 700), 144) for side in (378, 448, 560, 672, 896)),
        ("2x672", (900, 700), 720),
        ("2x896", (900, 700), 720),
        ("4-9x672", (4000, 4000), 1440),
        ("4-9x672", (672, 672), 720),
    ],
)
def test_image_tokens_of_the_papers_modes(mode, size, tokens):
    config = with_resolution(PRESETS["mm1-3b"], mode)
    assert config.image is not None
    shown = Image.new("RGB", size)
    picture = load_picture(shown, config.image)
    assert count_picture_tokens(picture, config) == tokens
    side = config.image.size
    assert all(tile.shape == (side, side, 3) for tile in picture.tiles)


def test_24_frames_are_3456_image_tokens():
    config = with_resolution(PRESETS["mm1-3b"], "4-9x672")
    assert config.image is not None
    frames = load_pictures([Frame(noise(40, 30))] * 24, config.image)
    assert sum(count_picture_tokens(frame, config) for frame in frames) == 3456


def test_equal_pictures_of_different_tilings_have_different_digests():
    photo = noise(60, 40)
    tilings = [None, SplitTiling(), SplitTiling(overview="last"), DynamicTiling()]
    digests = {load_picture(photo, image_config(20, t)).digest for t in tilings}
    assert len(digests) == len(tilings)


def test_all_tiles_of_a_request_are_counted_before_any_is_made():
    config = image_config(20, SplitTiling())
    limits = Limits(max_tile_pixels=2 * 5 * 400 - 1)
    assert len(load_pictures([noise(30, 30)], config, limits)) == 1
    message = (
        "2 pictures may become tiles of 4000 pixels together, expected at most 3999"
    )
    with pytest.raises(PromptError, match=message):
        load_pictures([noise(30, 30)] * 2, config, limits)
    assert len(load_pictures([noise(30, 30)] * 2, config, limits, tiled=1)) == 2


def test_a_grid_of_one_is_one_tile():
    for tiling in (
        SplitTiling(grid=1),
        DynamicTiling(min_tiles=1, max_grid_tiles=1),
    ):
        config = image_config(20, tiling)
        assert config.max_tiles == 1
        assert len(load_picture(noise(30, 30), config).tiles) == 1


# LLaVA-NeXT


@pytest.mark.reference
@pytest.mark.parametrize(
    "size", [(500, 300), (300, 500), (64, 64), (31, 400), (90, 89)]
)
def test_anyres_tiles_equal_transformers(size):
    module = pytest.importorskip(
        "transformers.models.llava_next.image_processing_pil_llava_next"
    )
    side = 28
    processor = module.LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=[[r * side, c * side] for r, c in LLAVA_NEXT],
    )
    photo = noise(*size)
    expected = np.asarray(processor(photo)["pixel_values"][0])
    config = ImageConfig(
        size=side,
        resize="squash",
        mean=CLIP_MEAN,
        std=CLIP_STD,
        tiling=AnyresTiling(grids=LLAVA_NEXT),
    )
    picture = load_picture(photo, config)
    assert picture.places[0] == (0, 0)
    tiles = np.stack(picture.tiles).transpose(0, 3, 1, 2)
    assert tiles.shape == expected[: len(tiles)].shape
    np.testing.assert_allclose(tiles, expected[: len(tiles)], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((672, 336), (1, 2)),
        ((336, 672), (2, 1)),
        ((500, 500), (2, 2)),
        ((90, 900), (3, 1)),
    ],
)
def test_anyres_keeps_most_pixels_and_wastes_fewest(size, grid):
    assert choose_resolution(size, 336, LLAVA_NEXT) == grid


def test_anyres_squashes_where_the_config_says_so():
    tiling = AnyresTiling(grids=((1, 2),), fill="squash", merge="rows")
    photo = noise(33, 61)
    picture = load_picture(photo, image_config(20, tiling))
    large = np.asarray(photo.resize((40, 20), Image.Resampling.BICUBIC))
    assert np.array_equal(bytes_of(picture.tiles[1]), large[:, :20])
    assert np.array_equal(bytes_of(picture.tiles[2]), large[:, 20:])


# Position indicators


def placed(*places):
    tile = np.zeros((2, 2, 3), np.float32)
    return Picture((tile,) * len(places), (4, 4), "", places)


GRID_2X2 = ((1, 1), (1, 2), (2, 1), (2, 2))


@pytest.mark.parametrize(
    ("indicators", "places", "texts"),
    [
        ("none", ((0, 0), *GRID_2X2), []),
        ("index", ((0, 0), (1, 1), (1, 2)), ["(3,0,0)", "(3,1,1)", "(3,1,2)"]),
        ("seps", (*GRID_2X2, (0, 0)), ["", ",", "<n>", ",", ":"]),
        ("seps", ((0, 0), *GRID_2X2), [":", "", ",", "<n>", ","]),
        ("seps", (), []),
    ],
)
def test_indicators_stand_before_every_tile(indicators, places, texts):
    tiling = SplitTiling(indicators=indicators)
    assert indicator_texts(placed(*places), 3, tiling) == texts
