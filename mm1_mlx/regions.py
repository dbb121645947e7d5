"""Places in pictures that messages refer to -> coordinates in text, and points. No mlx.

Ferret (arXiv 2310.07704), section 3.1, as apple/ml-ferret at 3c9e5c9 writes it in
ferret/eval/model_lvis.py: whole numbers as if the picture were 1000 x 1000, and for each
region a token that its sampler makes of points in it. Models without that sampler, as
MM1.5 (arXiv 2409.20566), read the coordinates alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mm1_mlx.config import MM1Config
from mm1_mlx.errors import PromptError
from mm1_mlx.image import (
    DEFAULT_LIMITS,
    name_of,
    open_picture,
    pillow_guard,
    upright,
    with_alpha,
)
from mm1_mlx.layout import Picture
from mm1_mlx.messages import Part, Region, RegionToken, Turn

# Pixels around a point on every side that count as its region.
SPAN = 5
_GOLDEN = (math.sqrt(5) - 1) / 2

Size = tuple[int, int]  # width, height
Mask = NDArray[np.bool_]  # [H, W]


@dataclass(frozen=True)
class Place:
    """A region in pixels of its picture.

    Attributes:
        coordinates: [x, y] or [x1, y1, x2, y2], what the text says.
        origin: left and top of the mask in the picture.
        mask: which pixels belong to it, [H, W].
    """

    coordinates: tuple[float, ...]
    origin: tuple[int, int]
    mask: Mask


def refer(
    turns: Sequence[Turn], pictures: Sequence[Picture], config: MM1Config
) -> tuple[list[Turn], list[Picture]]:
    """The turns with text in their regions' places, and the pictures with those regions.

    Where the model has a region sampler, a ``RegionToken`` stands after each text.

    Raises:
        PromptError: a region is not one of its picture.
    """
    points: list[list[NDArray[np.float32]]] = [[] for _ in pictures]
    result: list[Turn] = []
    for role, parts in turns:
        written: list[Part] = []
        for part in parts:
            if not isinstance(part, Region):
                written.append(part)
                continue
            assert part.picture is not None
            assert config.prompt is not None
            size = pictures[part.picture].size
            place = locate(part, size)
            text = spell(place.coordinates, size, config.prompt.coordinate_range)
            if config.region is None:
                written.append(text)
                continue
            written += [f"{text} ", RegionToken(part.picture)]
            drawn = draw_points(place, size, config.region.num_points)
            points[part.picture].append(drawn)
        result.append((role, written))
    referred = [
        replace(picture, regions=tuple(drawn)) if drawn else picture
        for picture, drawn in zip(pictures, points, strict=True)
    ]
    return result, referred


def spell(coordinates: Sequence[float], size: Size, most: int) -> str:
    """The text of coordinates in pixels: ``[156, 104, 468, 416]``."""
    # Upstream's order of the operations: another one rounds to another number at times.
    numbers = [int(value * (most / size[i % 2])) for i, value in enumerate(coordinates)]
    return f"[{', '.join(map(str, numbers))}]"


def locate(region: Region, size: Size) -> Place:
    """The region in a picture of ``size``.

    Raises:
        PromptError: it is not one of such a picture.
    """
    assert region.picture is not None
    return _LOCATE[region.kind](region.shape, size, f"picture {region.picture + 1}")


def _box(shape: Any, size: Size, picture: str) -> Place:
    box = x1, y1, x2, y2 = _numbers("box", shape, "[x1, y1, x2, y2]", picture)
    if x2 < x1 or y2 < y1:
        raise PromptError(
            f"box {list(shape)} of {picture} is reversed, expected left, top, right, "
            "bottom; exchange its corners"
        )
    width, height = size
    # Its right and bottom may be the picture's edge, as boxes in data sets are.
    if not (0 <= x1 < width and 0 <= y1 < height and x2 <= width and y2 <= height):
        raise _outside("box", shape, size, picture)
    left, top = int(x1), int(y1)
    right, bottom = min(int(x2), width - 1), min(int(y2), height - 1)
    # A whole window without its memory.
    mask = np.broadcast_to(np.True_, (bottom - top + 1, right - left + 1))
    return Place(box, (left, top), mask)


def _point(shape: Any, size: Size, picture: str) -> Place:
    x, y = _numbers("point", shape, "[x, y]", picture)
    width, height = size
    if not (0 <= x < width and 0 <= y < height):
        raise _outside("point", shape, size, picture)
    left, top = int(max(0, x - SPAN)), int(max(0, y - SPAN))
    right, bottom = int(min(width, x + SPAN + 1)), int(min(height, y + SPAN + 1))
    mask = np.broadcast_to(np.True_, (bottom - top, right - left))
    return Place((x, y), (left, top), mask)


def _mask(shape: Any, size: Size, picture: str) -> Place:
    mask = read_mask(shape, size, picture)
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not rows.size:
        raise PromptError(
            f"mask of {picture} is empty; paint the region white and the rest black"
        )
    left, right = int(columns[0]), int(columns[-1])
    top, bottom = int(rows[0]), int(rows[-1])
    inside = mask[top : bottom + 1, left : right + 1]
    return Place((left, top, right, bottom), (left, top), inside)


_LOCATE = {"box": _box, "point": _point, "mask": _mask}


def _numbers(kind: str, shape: Any, form: str, picture: str) -> tuple[float, ...]:
    given = shape.tolist() if isinstance(shape, np.ndarray) else shape
    if (
        isinstance(given, list | tuple)
        and len(given) == form.count(",") + 1
        and all(isinstance(x, Real) for x in given)
    ):
        try:
            numbers = tuple(map(float, given))
        except OverflowError:
            # Not written out: Python refuses to, of very long ones.
            raise PromptError(
                f"{kind} of {picture} has a number that no float holds, expected {form} "
                "in its pixels"
            ) from None
        if all(map(math.isfinite, numbers)):
            return numbers
    raise PromptError(
        f"{kind} of {picture} is {shape!r:.60}, expected {form} in its pixels"
    )


def _outside(kind: str, shape: Any, size: Size, picture: str) -> PromptError:
    return PromptError(
        f"{kind} {list(shape)} is not inside {picture}, which has {size[0]} x {size[1]} "
        "pixels; give pixels of the upright picture, counted from its top left"
    )


def read_mask(source: Any, size: Size, picture: str) -> Mask:
    """Which pixels [H, W] of a picture of ``size`` a mask marks.

    Args:
        source: an array [H, W] whose nonzero elements count, or a picture file, bytes or
            Pillow image, turned as its EXIF says, whose pixels more than half as bright
            as the brightest do: compression leaves traces in the black. What is
            transparent does not.
        size: width and height of the upright picture.
        picture: what errors call it.

    Raises:
        PromptError: it cannot be read, or is of another size.
    """
    if isinstance(source, np.ndarray):
        if source.ndim != 2:
            raise PromptError(
                f"mask of {picture} is an array of shape {source.shape}, expected "
                f"({size[1]}, {size[0]}): its height and width"
            )
        _check_size(source.shape[::-1], size, picture)
        return source != 0
    name = name_of(source, 1)
    name = f"mask of {picture}" if name == "picture 1" else f"mask {name}"
    image = open_picture(source, name, DEFAULT_LIMITS)
    # Of the header: a large one is not decoded only to be refused. Lying on its side it
    # may yet be turned, which a PNG may say behind the pixels.
    if image.size != size[::-1]:
        _check_size(image.size, size, picture)
    with pillow_guard(f"{name} is damaged or cut short; save it again", name):
        image = upright(image)
        _check_size(image.size, size, picture)
        levels = _levels(image)
    return levels > levels.max() / 2


def _levels(image: Image.Image) -> NDArray[Any]:
    """How bright each pixel [H, W] is; what is transparent is black."""
    if image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        levels = np.asarray(image)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            # Pillow counts to 255 in it where it does not in the pixels.
            scale = 255 if image.mode == "1" else 1
            levels = levels * (levels * scale != transparent)
        return levels
    page = Image.new("RGBA", image.size, "black")
    page.alpha_composite(with_alpha(image))
    return np.asarray(page.convert("L"))


def _check_size(found: tuple[int, ...], size: Size, picture: str) -> None:
    if tuple(found) != size:
        raise PromptError(
            f"mask of {picture} has {found[0]} x {found[1]} pixels, expected its "
            f"{size[0]} x {size[1]}; resize it, without smoothing"
        )


def draw_points(place: Place, size: Size, count: int) -> NDArray[np.float32]:
    """Points [count, 2] of a region, x and y in 0..1, evenly over its pixels.

    Ferret draws them at random. Here one comes from each of ``count`` equal stretches of
    the region's pixels, row by row, at a place that moves by the golden ratio: always
    the middle would be one column where a row is as long as a stretch. Of fewer pixels
    all are taken, and as often as each other.
    """
    totals = place.mask.sum(axis=1).cumsum()
    total = int(totals[-1])
    steps = np.arange(count)
    shift = steps * _GOLDEN % 1 if total > count else 0.0
    ranks = np.minimum((steps + shift) * total / count, total - 1).astype(np.int64)
    rows = np.searchsorted(totals, ranks, side="right")
    columns = np.empty(count, dtype=np.int64)
    for row in np.unique(rows):
        here = rows == row
        filled = np.flatnonzero(place.mask[row])
        columns[here] = filled[ranks[here] - (totals[row] - filled.size)]
    left, top = place.origin
    x, y = (columns + left) / size[0], (rows + top) / size[1]
    return np.stack([x, y], axis=1).astype(np.float32)
