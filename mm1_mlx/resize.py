"""An RGB picture -> a square of pixels as the config says, and normalised. No mlx.

Follows the CLIP and LLaVA image processors of transformers 5.23 (its Pillow backend),
within 1e-6; bilinear resampling follows TensorFlow's ``image.resize`` as apple/ml-veclip
at ecce5da calls it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mm1_mlx.config import ImageConfig

# Above these, only strips reach an intermediate picture of such a size (in pixels).
_MAX_ENLARGED = 2**24
_MAX_SQUARE = 2**27

# [H, W, 3], 0..255: whole numbers, or not where the resampling does not round.
Pixels = NDArray[Any]


def to_square(image: Image.Image, config: ImageConfig, side: int) -> Pixels:
    """The picture, in mode RGB, as [side, side, 3], by the config's ``resize``."""
    if config.resample == "bilinear":
        return _bilinear_square(image, config, side)
    return np.asarray(_RESIZE[config.resize](image, config, side))


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture stretched to ``size`` (width, height)."""
    return image.resize(size, Image.Resampling.BICUBIC)


def mean_colour(config: ImageConfig) -> tuple[int, int, int]:
    """The colour that becomes nearly 0, for padding."""
    red, green, blue = (int(255 * mean) for mean in config.mean)
    return red, green, blue


def _squash(image: Image.Image, config: ImageConfig, side: int) -> Image.Image:  # noqa: ARG001
    return resize(image, (side, side))


def _crop(image: Image.Image, config: ImageConfig, side: int) -> Image.Image:
    """The centre of the picture whose shortest edge has become what is cropped from."""
    short, shortest = min(image.size), _shortest(config, side)
    width, height = (int(shortest * edge / short) for edge in image.size)
    left, top = _margin(width, side, config), _margin(height, side, config)
    if width * height <= _MAX_ENLARGED:
        resized = resize(image, (width, height))
        return resized.crop((left, top, left + side, top + side))
    # The same up to rounding, without enlarging a strip to gigabytes only to cut it.
    # In two steps to keep Pillow's order: horizontally, then vertically.
    x, y = image.width / width, image.height / height
    columns = (left * x, 0.0, (left + side) * x, float(image.height))
    rows = (0.0, top * y, float(side), (top + side) * y)
    narrow = image.resize((side, image.height), Image.Resampling.BICUBIC, box=columns)
    return narrow.resize((side, side), Image.Resampling.BICUBIC, box=rows)


def _shortest(config: ImageConfig, side: int) -> int:
    """The shortest edge that a square of ``side`` is cut from."""
    return side if config.crop_from is None else side * config.crop_from // config.size


def _margin(length: int, side: int, config: ImageConfig) -> int:
    """How many pixels before the centre are cut off."""
    # Python rounds halves to even.
    return (
        round((length - side) / 2)
        if config.crop_rounding == "even"
        else (length - side) // 2
    )


def _pad(image: Image.Image, config: ImageConfig, side: int) -> Image.Image:
    """The picture in the middle of a square of the mean colour, resized."""
    width, height = image.size
    longest = max(image.size)
    canvas = (longest, longest)
    if longest * longest > _MAX_SQUARE:
        # The long side first, nearly equal: a strip's square would take a gigabyte.
        wide = width > height
        canvas = (side, longest) if wide else (longest, side)
        width, height = (side, height) if wide else (width, side)
        image = resize(image, (width, height))
    square = Image.new("RGB", canvas, mean_colour(config))
    square.paste(image, ((canvas[0] - width) // 2, (canvas[1] - height) // 2))
    return resize(square, (side, side))


def _bilinear_square(
    image: Image.Image, config: ImageConfig, side: int
) -> NDArray[np.float32]:
    """The picture as [side, side, 3] from four pixels each, not rounded."""
    size = (side, side)
    if config.resize == "crop":
        scale = _shortest(config, side) / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
    columns, rows = (
        _Taps.of(old, new, _margin(new, side, config), side)
        for old, new in zip(image.size, size, strict=True)
    )
    pixels = np.asarray(image)
    # Rows first: of a large picture only those that are read become floating point.
    x = _mix(pixels[rows.low], pixels[rows.high], rows.weight[:, None, None])
    return _mix(x[:, columns.low], x[:, columns.high], columns.weight[:, None])


def _mix(low: Pixels, high: Pixels, weight: NDArray[np.float32]) -> NDArray[np.float32]:
    low = low.astype(np.float32)
    return low + (high - low) * weight


@dataclass(frozen=True)
class _Taps:
    """Which two of an axis' pixels each new one lies between, and how far."""

    low: NDArray[np.intp]
    high: NDArray[np.intp]
    weight: NDArray[np.float32]

    @classmethod
    def of(cls, old: int, new: int, first: int, count: int) -> _Taps:
        """Those of ``count`` new pixels from the ``first``, of ``new`` in all."""
        # Pixels are read at their centres.
        x = (np.arange(first, first + count) + 0.5) * (old / new) - 0.5
        low = np.floor(x)
        weight = (x - low).astype(np.float32)
        low, high = (np.clip(i, 0, old - 1).astype(np.intp) for i in (low, low + 1))
        return cls(low, high, weight)


_RESIZE = {"squash": _squash, "crop": _crop, "pad": _pad}


def normalise(square: Pixels, config: ImageConfig) -> NDArray[np.float32]:
    """Pixels [H, W, 3] of mean 0: (pixel / 255 - mean) / std."""
    pixels: NDArray[np.float32] = np.array(square, dtype=np.float32)
    pixels /= 255
    pixels -= np.array(config.mean, dtype=np.float32)
    pixels /= np.array(config.std, dtype=np.float32)
    return pixels
