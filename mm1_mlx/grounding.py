"""Boxes that an answer names in text -> pixels, and drawn onto the picture. No mlx.

Ferret (arXiv 2310.07704) writes each box behind the phrase it belongs to, in whole numbers
as if the picture were 1000 x 1000: ``a dog [156, 104, 468, 416] beside two cats [..] [..]``.
They are read as apple/ml-ferret at 3c9e5c9 reads them, ferret/eval/model_refcoco.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mm1_mlx.errors import PromptError
from mm1_mlx.image import DEFAULT_LIMITS, ImageSource, decode, name_of, open_picture

_NUMBER = r"\s*(-?\d{1,6})\s*"
_BOX = re.compile(rf"\[{','.join([_NUMBER] * 4)}\]")
# What may stand between two boxes of one phrase: these words, and what is around them.
_JOINS = {"and", "or", ""}
_BETWEEN = re.compile(r"[\s,;&]+")
_LEADING_JOINS = re.compile(r"(?:(?:and|or)(?:[\s,;&]+|$))+")
# What separates phrases: the end of a sentence or a line.
_ENDS = re.compile(r"[.!?;:](?:\s|$)|\n")
_MAX_LABEL = 40
# Where an ICC profile names the space of its colours (ICC.1:2022, section 7.2).
_ICC_SPACE = slice(16, 20)
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# Pixels a side; the others hold more than a picture may have.
_MAX_WEBP_SIDE = 16_383
# Far apart in hue, and dark enough for white letters.
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#b8570a", "#117a8b")


@dataclass(frozen=True)
class Box:
    """A box in pixels, left, top, right and bottom, and the phrase that it belongs to."""

    label: str
    box: tuple[int, int, int, int]


def parse_boxes(
    text: str, size: tuple[int, int], coordinate_range: int = 1000
) -> list[Box]:
    """The boxes that a text names, in its order.

    A label is the phrase before its box, back to the box or the end of a sentence before
    it; boxes that follow each other share one. What reaches past the picture is clipped.
    A box that lies outside, or whose corners are reversed, is left out.

    Args:
        text: an answer.
        size: width and height of the picture in pixels.
        coordinate_range: what the coordinates count to.
    """
    boxes: list[Box] = []
    label, end = "", 0
    for match in _BOX.finditer(text):
        between = text[end : match.start()]
        if not (end and _JOINS.issuperset(_BETWEEN.split(between))):
            label = _phrase(between)
        end = match.end()
        box = _in_pixels([int(x) for x in match.groups()], size, coordinate_range)
        if box is not None:
            boxes.append(Box(label, box))
    return boxes


def _phrase(text: str) -> str:
    """The last phrase of a text, without what joins it to the one before."""
    # What ends the text itself, as a colon before a box, separates nothing.
    last = _ENDS.split(text.rstrip().rstrip(".!?;:,"))[-1]
    last = last.strip(" ,.;&-*")
    joins = _LEADING_JOINS.match(last)
    return (last[joins.end() :] if joins else last).strip()


def _in_pixels(
    numbers: Sequence[int], size: tuple[int, int], most: int
) -> tuple[int, int, int, int] | None:
    x1, y1, x2, y2 = numbers
    reversed_ = x2 < x1 or y2 < y1
    if reversed_ or x2 < 0 or y2 < 0 or x1 > most or y1 > most:
        return None
    left, top, right, bottom = (
        # In upstream's order, as ``regions.spell`` counts.
        int(min(max(value, 0), most) * (size[i % 2] / most))
        for i, value in enumerate(numbers)
    )
    return left, top, right, bottom


def load_upright(source: ImageSource) -> Image.Image:
    """The picture in mode RGB, as its coordinates count.

    Raises:
        PromptError: it cannot be read.
    """
    name = name_of(source, 1)
    image = decode(open_picture(source, name, DEFAULT_LIMITS), name)
    # Pillow writes it into the drawing: one of grey or CMYK would be wrong for RGB.
    profile = image.info.get("icc_profile")
    if profile and profile[_ICC_SPACE] != b"RGB ":
        # A copy: a Pillow image in mode RGB is the caller's own.
        image = image.copy()
        del image.info["icc_profile"]
    return image


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy of the picture with every box and its label on it, a colour per label."""
    drawn = image.copy()
    pen = ImageDraw.Draw(drawn)
    width = max(1, round(max(image.size) / 300))
    font = ImageFont.load_default(size=max(10, round(max(image.size) / 40)))
    labels = list(dict.fromkeys(box.label for box in boxes))
    colours = [COLOURS[labels.index(box.label) % len(COLOURS)] for box in boxes]
    # A box may end at the picture's edge, or begin there, which is one past its pixels.
    most = (image.width - 1, image.height - 1) * 2
    corners = [tuple(map(min, box.box, most)) for box in boxes]
    for place, colour in zip(corners, colours, strict=True):
        pen.rectangle(place, outline=colour, width=width)
    # Labels last: no box crosses one.
    for box, place, colour in zip(boxes, corners, colours, strict=True):
        if box.label:
            _write(pen, box.label, place[:2], colour, font, image.width)
    return drawn


def _write(
    pen: ImageDraw.ImageDraw,
    label: str,
    corner: Sequence[int],
    colour: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    most: int,
) -> None:
    """The label on a plate above its box, or inside where there is no room above.

    Args:
        pen: draws on the picture.
        label: the text.
        corner: left and top of the box.
        colour: of the plate.
        font: of the letters.
        most: width of the picture.
    """
    if len(label) > _MAX_LABEL:
        label = f"{label[: _MAX_LABEL - 1]}…"
    left, top, right, bottom = pen.textbbox((0, 0), label, font=font)
    width, height, margin = right - left, bottom - top, 2
    x = max(0, min(corner[0], most - int(width) - 2 * margin))
    y = corner[1] - int(height) - 2 * margin
    y = corner[1] if y < 0 else y
    plate = (x, y, x + width + 2 * margin, y + height + 2 * margin)
    pen.rectangle(plate, fill=colour)
    pen.text((x + margin - left, y + margin - top), label, fill="white", font=font)


def check_drawing(path: Path, size: tuple[int, int] | None = None) -> None:
    """Pass only if a picture can be written there.

    Args:
        path: where.
        size: its width and height in pixels, if they are known already.

    Raises:
        PromptError: its suffix names no format, or one that such a picture does not fit
            into, or its folder does not exist.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise PromptError(
            f"{str(path)!r} ends with {path.suffix!r}, expected one of {list(FORMATS)}"
        )
    if kind == "WEBP" and size is not None and max(size) > _MAX_WEBP_SIDE:
        raise PromptError(
            f"the picture has {size[0]} x {size[1]} pixels, but a WebP file holds at most "
            f"{_MAX_WEBP_SIDE} a side; name a .png file to write"
        )
    if path.is_dir() or not path.parent.is_dir():
        wrong = "is a folder" if path.is_dir() else "lies in a folder that is not there"
        raise PromptError(f"{str(path)!r} {wrong}; name a picture file to write")


def save_drawing(image: Image.Image, path: Path) -> None:
    """Write the picture in the format of its suffix, whole or not at all.

    Raises:
        PromptError: see ``check_drawing``.
    """
    check_drawing(path, image.size)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        image.save(partial, FORMATS[path.suffix.lower()])
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
