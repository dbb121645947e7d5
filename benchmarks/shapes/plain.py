"""Pictures by other means than the generator's: plain Pillow calls, no anti-aliasing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star")
# Names as CSS and Pillow know them.
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
BACKGROUNDS = ("white", "lightgrey", "grey")
SIZES = (96, 224, 320)

Plain = tuple[Image.Image, str, str]


def plain_pictures() -> Iterator[Plain]:
    """Every colour, shape, background and size once: (picture, colour, shape)."""
    cases = product(COLOURS, SHAPES, BACKGROUNDS, SIZES)
    for i, (colour, shape, background, size) in enumerate(cases):
        image = Image.new("RGB", (size, size), background)
        # A radius of 15% to 33% of the side, somewhere near the middle.
        radius = size * (0.15 + 0.06 * (i % 4))
        x = size * (0.5 + 0.04 * (i % 5 - 2))
        y = size * (0.5 + 0.04 * (i % 7 - 3))
        _draw(ImageDraw.Draw(image), shape, colour, (x, y, radius))
        yield image, colour, shape


def _draw(
    pen: ImageDraw.ImageDraw,
    shape: str,
    colour: str,
    circle: tuple[float, float, float],
) -> None:
    x, y, r = circle
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=colour)
    else:
        radii = [r if k % 2 == 0 else 0.4 * r for k in range(10)]
        corners = [
            (x + a * math.sin(k * math.pi / 5), y - a * math.cos(k * math.pi / 5))
            for k, a in enumerate(radii)
        ]
        pen.polygon(corners, fill=colour)
