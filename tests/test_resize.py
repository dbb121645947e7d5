"""What is cropped from a larger picture, and TensorFlow's bilinear resampling."""

import math

import numpy as np
import pytest
from PIL import Image

from mm1_mlx.config import ImageConfig
from mm1_mlx.errors import ConfigError
from mm1_mlx.presets import CLIP_MEAN, CLIP_STD
from mm1_mlx.resize import normalise, to_square

# Width and height in pixels: landscape, portrait, square, smaller than a tile, odd.
PICTURES = [(97, 61), (45, 120), (64, 64), (20, 31), (256, 33), (33, 34)]


def config(**fields):
    values = {"size": 32, "resize": "crop", "mean": CLIP_MEAN, "std": CLIP_STD}
    return ImageConfig(**values | fields)


def picture(width, height):
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def tensorflow_bilinear(image, width, height):
    """tf.image.resize, bilinear, antialias=False: half-pixel centres, edges repeated."""
    pixels = np.asarray(image, np.float64)
    result = np.empty((height, width, 3))
    for i in range(height):
        y = min(max((i + 0.5) * image.height / height - 0.5, 0), image.height - 1)
        top, bottom = int(y), min(int(y) + 1, image.height - 1)
        for j in range(width):
            x = min(max((j + 0.5) * image.width / width - 0.5, 0), image.width - 1)
            left, right = int(x), min(int(x) + 1, image.width - 1)
            a, b = x - left, y - top
            upper = (1 - a) * pixels[top, left] + a * pixels[top, right]
            lower = (1 - a) * pixels[bottom, left] + a * pixels[bottom, right]
            result[i, j] = (1 - b) * upper + b * lower
    return result


@pytest.mark.parametrize("size", PICTURES)
def test_bilinear_squash_is_tensorflow_s(size):
    image = picture(*size)
    values = config(resize="squash", resample="bilinear")
    expected = tensorflow_bilinear(image, 32, 32)
    square = to_square(image, values, 32)
    np.testing.assert_allclose(square / 255, expected / 255, rtol=0, atol=1e-5)
    tile = (expected / 255 - CLIP_MEAN) / CLIP_STD
    np.testing.assert_allclose(normalise(square, values), tile, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", PICTURES)
def test_bilinear_crop_is_veclip_s(size):
    """The shortest edge to the tile's side, the other rounded, then the centre."""
    image = picture(*size)
    scale = 32 / min(size)
    width, height = (int(np.round(edge * scale)) for edge in size)
    left, top = int((width - 32) / 2), int((height - 32) / 2)
    whole = tensorflow_bilinear(image, width, height)
    expected = whole[top : top + 32, left : left + 32]
    square = to_square(image, config(resample="bilinear"), 32)
    np.testing.assert_allclose(square / 255, expected / 255, rtol=0, atol=1e-5)


def test_bilinear_does_not_average_what_it_skips():
    """Of every four columns the middle two are read, whatever lies between."""
    pixels = np.zeros((32, 128, 3), np.uint8)
    pixels[:, 1::4] = pixels[:, 2::4] = 200
    square = to_square(
        Image.fromarray(pixels), config(resize="squash", resample="bilinear"), 32
    )
    assert np.array_equal(square, np.full((32, 32, 3), 200.0))
    averaged = to_square(Image.fromarray(pixels), config(resize="squash"), 32)
    assert averaged.mean() < 150


@pytest.mark.parametrize("size", PICTURES)
@pytest.mark.parametrize("rounding", ["down", "even"])
@pytest.mark.parametrize("crop_from", [None, 32, 37, math.ceil(32 / 0.875), 48])
def test_the_centre_is_cut_from_a_larger_picture(size, rounding, crop_from):
    """As torchvision's Resize and CenterCrop, and transformers', do."""
    image, shortest = picture(*size), crop_from or 32
    short, long = sorted(size)
    other = int(shortest * long / short)
    width, height = (shortest, other) if size[0] == short else (other, shortest)
    resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    rounded = {"down": math.floor, "even": round}[rounding]
    left, top = rounded((width - 32) / 2), rounded((height - 32) / 2)
    expected = resized[top : top + 32, left : left + 32]
    values = config(crop_from=crop_from, crop_rounding=rounding)
    assert np.array_equal(to_square(image, values, 32), expected)


def test_the_two_roundings_differ_by_a_pixel_of_some_pictures():
    image = picture(35, 32)
    down, even = (
        to_square(image, config(crop_rounding=way), 32) for way in ("down", "even")
    )
    assert np.array_equal(down[:, 1:], even[:, :-1])
    assert not np.array_equal(down, even)


def test_a_thin_strip_is_cut_without_being_enlarged():
    image = Image.new("RGB", (16_000, 2), "red")
    values = config(crop_from=48, size=32)
    assert to_square(image, values, 32).shape == (32, 32, 3)
    square = to_square(image, config(resample="bilinear"), 32)
    assert np.array_equal(square[0, 0], [255, 0, 0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resize": "squash", "crop_from": 40}, "crop_from: 40 needs resize 'crop'"),
        ({"crop_from": 31}, "at least size 32"),
        ({"resize": "pad", "resample": "bilinear"}, "'bilinear' needs resize"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        config(**fields)
