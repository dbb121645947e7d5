"""An opened picture -> upright RGB, by one rule for every mode."""

from __future__ import annotations

import io
import threading

import numpy as np
from PIL import Image

from mm1_mlx.errors import PromptError
from mm1_mlx.image.guard import PILLOW_ERRORS, pillow_guard
from mm1_mlx.image.opening import content, open_picture
from mm1_mlx.image.source import ImageSource, Limits

# One of them for every Pillow image: in the hands of several threads, one loads it.
_LOADING = tuple(threading.Lock() for _ in range(61))
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(image: Image.Image, name: str) -> Image.Image:
    """The picture from ``open_picture`` upright, in mode RGB.

    Raises:
        PromptError: it is damaged.
    """
    kind = image.format or "Pillow image"
    damaged = f"{name} is damaged or cut short ({kind}); save or download it again"
    with pillow_guard(damaged, name):
        return _rgb(upright(image), name)


def upright(image: Image.Image) -> Image.Image:
    """The picture in its own mode, turned as its EXIF says; within ``pillow_guard``."""
    with _LOADING[id(image) % len(_LOADING)]:
        image.load()
    # Only now: a PNG may carry its EXIF behind the pixels.
    turn = _UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1..8; 1 where the EXIF is unreadable, as viewers take it."""
    try:
        value = image.getexif().get(_ORIENTATION)
    except PILLOW_ERRORS:
        return 1
    return value if isinstance(value, int) else 1


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """The picture in mode RGB.

    | mode | rule |
    |---|---|
    | 1, L, P, RGB, RGBX, CMYK, YCbCr, HSV, LAB | Pillow's conversion |
    | LA, La, PA, RGBA, RGBa, a transparent colour or palette | over white |
    | I;16 and its byte orders, I | the high byte of 16 bits, as 16-bit RGB is read |
    | F | 0..255, rounded |
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey(image, name).convert("RGB")
    if image.has_transparency_data:
        # White, since what is drawn on nothing is mostly drawn for a page: black text
        # would vanish on black. transformers drops alpha and shows the hidden colours.
        image = with_alpha(image)
        page = Image.new("RGB", image.size, "white")
        page.paste(image, mask=image)
        return page
    return image if image.mode == "RGB" else image.convert("RGB")


def with_alpha(image: Image.Image) -> Image.Image:
    """The picture in mode RGBA."""
    # Pillow knows no way from La to anything else.
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _grey(image: Image.Image, name: str) -> Image.Image:
    samples = np.asarray(image)
    low, high, most = samples.min(), samples.max(), 255 if image.mode == "F" else 65535
    # Written so that NaN fails too.
    if not (low >= 0 and high <= most):
        raise PromptError(
            f"{name} has samples of {low}..{high} in mode {image.mode!r}, expected "
            f"0..{most}; convert it to RGB first"
        )
    grey = np.rint(samples) if image.mode == "F" else samples >> 8
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[samples == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8))


def encoded(source: ImageSource, name: str, limits: Limits) -> bytes:
    """The picture as an encoded file: as it was given, a Pillow image as PNG.

    Raises:
        PromptError: it cannot be read, or is too large.
    """
    given = content(source, name, limits)
    image = open_picture(given, name, limits)
    if isinstance(given, bytes):
        return given
    buffer = io.BytesIO()
    decode(image, name).save(buffer, "PNG")
    return buffer.getvalue()
