"""An RGB picture -> one normalised tile [size, size, 3], as the config says. No mlx.

Follows the CLIP and LLaVA image processors of transformers 5.23 (its Pillow backend),
within 1e-6.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mm1_mlx.config import ImageConfig

# Above these, only strips reach an intermediate picture of such a size (in pixels).
_MAX_ENLARGED = 2**24
_MAX_SQUARE = 2**27


def to_tile(image: Image.Image, config: ImageConfig) -> NDArray[np.float32]:
    """The picture, in mode RGB, as pixels [size, size, 3] of mean 0."""
    return _normalise(_RESIZE[config.resize](image, config), config)


def _squash(image: Image.Image, config: ImageConfig) -> Image.Image:
    return image.resize((config.size, config.size), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, config: ImageConfig) -> Image.Image:
    """The centre of the picture whose shortest edge has become ``size``."""
    size, short = config.size, min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    if width * height <= _MAX_ENLARGED:
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return resized.crop((left, top, left + size, top + size))
    # The same up to rounding, without enlarging a strip to gigabytes only to cut it.
    # In two steps to keep Pillow's order: horizontally, then vertically.
    x, y = image.width / width, image.height / height
    columns = (left * x, 0.0, (left + size) * x, float(image.height))
    rows = (0.0, top * y, float(size), (top + size) * y)
    narrow = image.resize((size, image.height), Image.Resampling.BICUBIC, box=columns)
    return narrow.resize((size, size), Image.Resampling.BICUBIC, box=rows)


def _pad(image: Image.Image, config: ImageConfig) -> Image.Image:
    """The picture in the middle of a square of the mean colour, resized."""
    width, height = image.size
    side = max(image.size)
    canvas = (side, side)
    if side * side > _MAX_SQUARE:
        # The long side first, nearly equal: a strip's square would take a gigabyte.
        wide = width > height
        canvas = (config.size, side) if wide else (side, config.size)
        width, height = (config.size, height) if wide else (width, config.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    red, green, blue = (int(255 * mean) for mean in config.mean)
    square = Image.new("RGB", canvas, (red, green, blue))
    square.paste(image, ((canvas[0] - width) // 2, (canvas[1] - height) // 2))
    return _squash(square, config)


_RESIZE = {"squash": _squash, "crop": _crop, "pad": _pad}


def _normalise(image: Image.Image, config: ImageConfig) -> NDArray[np.float32]:
    """Pixels [H, W, 3] of mean 0: (pixel / 255 - mean) / std."""
    pixels: NDArray[np.float32] = np.array(image, dtype=np.float32)
    pixels /= 255
    pixels -= np.array(config.mean, dtype=np.float32)
    pixels /= np.array(config.std, dtype=np.float32)
    return pixels
