"""A scene as a picture: masks three times as large as drawn, averaged down."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFont

from benchmarks.shapes.scene import RGB, Background, Label, Object, Scene

SUPERSAMPLE = 3
# Height of a capital, as a share of the font's size.
CAPITAL = 0.7
Points = list[tuple[float, float]]
Mask = Image.Image


def draw(scene: Scene) -> Image.Image:
    """The scene, RGB, ``scene.width`` by ``scene.height`` pixels."""
    image = _draw_background(scene.background, scene.width, scene.height)
    for item in scene.objects:
        _draw_object(image, item)
    for label in scene.labels:
        _draw_label(image, label)
    return image


def corners(item: Object) -> NDArray[np.float64]:
    """Corners [points, 2] of an object, in pixels of its picture."""
    return np.array(_points(item, (item.x, item.y), item.radius))


def letter_places(label: Label) -> list[float]:
    """Where the middle of each letter is, in pixels from the left."""
    widths = [width * label.height for width in _letter_widths(label.text)]
    ends = np.cumsum(widths)
    start = label.x - ends[-1] / 2
    return [start + end - width / 2 for end, width in zip(ends, widths, strict=True)]


def _letter_widths(text: str) -> list[float]:
    """Of every letter with its gap, in heights of a capital."""
    font = _font(100)
    return [font.getlength(letter) / (100 * CAPITAL) for letter in text]


@lru_cache(maxsize=256)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow lacks FreeType"
    return font


def _draw_label(image: Image.Image, label: Label) -> None:
    """Letter by letter: no pair of them is kerned, so that their places are known."""
    height = label.height * SUPERSAMPLE
    mask = Image.new("L", (image.width * SUPERSAMPLE, image.height * SUPERSAMPLE), 0)
    pen = ImageDraw.Draw(mask)
    font = _font(round(height / CAPITAL))
    base = label.y * SUPERSAMPLE + height / 2
    for letter, x in zip(label.text, letter_places(label), strict=True):
        pen.text((x * SUPERSAMPLE, base), letter, fill=255, font=font, anchor="ms")
    image.paste(label.rgb, (0, 0), mask.reduce(SUPERSAMPLE))


def outline(shape: str, form: float) -> NDArray[np.float64]:
    """Corners [points, 2] of an upright shape in the unit circle, y pointing down."""
    if shape == "circle":
        return _polar(np.ones(64), 0.0)
    if shape == "square":
        return _polar(np.ones(4), math.pi / 4)
    if shape == "triangle":
        return _fit(np.array([(0, -1.1 - 0.7 * form), (1, 0.6), (-1, 0.6)]))
    if shape == "star":
        return _polar(np.tile([1, 0.36 + 0.12 * form], 5), -math.pi / 2)
    if shape == "cross":
        a, b = 1.0, 0.25 + 0.15 * form
        return _fit(
            np.array(
                [
                    (b, -a),
                    (b, -b),
                    (a, -b),
                    (a, b),
                    (b, b),
                    (b, a),
                    (-b, a),
                    (-b, b),
                    (-a, b),
                    (-a, -b),
                    (-b, -b),
                    (-b, -a),
                ]
            )
        )
    if shape == "arrow":
        a, b = 0.16 + 0.1 * form, 0.5 + 0.1 * form
        tip = [(0, -1), (b, -0.25), (a, -0.25), (a, 0.8)]
        return _fit(np.array([*tip, *((-x, y) for x, y in reversed(tip[1:]))]))
    return _heart(form)


def _polar(radii: NDArray[np.float64], start: float) -> NDArray[np.float64]:
    angles = start + np.arange(len(radii)) * (2 * math.pi / len(radii))
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _heart(form: float) -> NDArray[np.float64]:
    t = np.arange(48) * (2 * math.pi / 48)
    x = 16 * np.sin(t) ** 3
    y = 2.5 + 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return _fit(np.stack([x, -(0.9 + 0.25 * form) * y], axis=1))


def _fit(points: NDArray[np.float64]) -> NDArray[np.float64]:
    return points / np.hypot(points[:, 0], points[:, 1]).max()


def _draw_background(background: Background, width: int, height: int) -> Image.Image:
    start, stop = background.start, background.stop
    if start == stop and not background.noise:
        return Image.new("RGB", (width, height), start)
    angle = math.radians(background.angle)
    dx, dy = math.cos(angle), math.sin(angle)
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32)
    y = np.linspace(-0.5, 0.5, height, dtype=np.float32)
    ramp = 0.5 + (dx * x + dy * y[:, None]) / (abs(dx) + abs(dy))
    low, high = np.float32(start), np.float32(stop)
    pixels = low + ramp[..., None] * (high - low)
    if background.noise:
        rng = np.random.default_rng(background.seed)
        grain = rng.standard_normal((height, width, 1), dtype=np.float32)
        pixels += background.noise * grain
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def _draw_object(image: Image.Image, item: Object) -> None:
    left, top = (
        math.floor(item.x - item.radius) - 1,
        math.floor(item.y - item.radius) - 1,
    )
    side = 2 * math.ceil(item.radius) + 4
    radius = item.radius * SUPERSAMPLE
    centre = ((item.x - left) * SUPERSAMPLE, (item.y - top) * SUPERSAMPLE)
    points = _points(item, centre, radius)
    body = _blank(side * SUPERSAMPLE)
    if item.style == "outline":
        width = max(0.2 * radius, 2.5 * SUPERSAMPLE)
        _stroke(body, _points(item, centre, radius - width / 2), width)
    else:
        ImageDraw.Draw(body).polygon(points, fill=255)
    if item.style in ("striped", "dotted"):
        body = _hatch(body, item, centre, radius)
        _stroke(body, _points(item, centre, radius * 0.96), max(0.08 * radius, 3.0))
    _paste(image, item.rgb, body, (left, top))
    if item.style == "edged":
        edge = _blank(side * SUPERSAMPLE)
        width = max(0.09 * radius, SUPERSAMPLE)
        _stroke(edge, _points(item, centre, radius - width / 2), width)
        _paste(image, _edge_colour(item.rgb), edge, (left, top))


def _points(item: Object, centre: tuple[float, float], radius: float) -> Points:
    angle = math.radians(item.rotation)
    cos, sin = math.cos(angle), math.sin(angle)
    corners = radius * outline(item.shape, item.form)
    turned = corners @ np.array([[cos, sin], [-sin, cos]]) + centre
    return [(x, y) for x, y in turned.tolist()]


def _stroke(mask: Mask, points: Points, width: float) -> None:
    closed = [*points, *points[:2]]
    ImageDraw.Draw(mask).line(closed, fill=255, width=round(width), joint="curve")


def _hatch(
    body: Mask, item: Object, centre: tuple[float, float], radius: float
) -> Mask:
    """``body`` where stripes or dots about its centre cover it."""
    pattern = _blank(body.width)
    pen = ImageDraw.Draw(pattern)
    pitch = max(0.3 * radius, 5.0 * SUPERSAMPLE)
    steps = np.arange(-math.ceil(radius / pitch), math.ceil(radius / pitch) + 1) * pitch
    # The hatch does not turn with the shape: ``form`` is as good an angle as any.
    angle = math.pi * item.form
    cos, sin = math.cos(angle), math.sin(angle)
    for u in steps.tolist():
        if item.style == "striped":
            x, y = centre[0] - u * sin, centre[1] + u * cos
            reach = (radius * cos, radius * sin)
            ends = (x - reach[0], y - reach[1], x + reach[0], y + reach[1])
            pen.line(ends, fill=255, width=round(0.55 * pitch))
            continue
        for v in steps.tolist():
            x, y = centre[0] + u * cos - v * sin, centre[1] + u * sin + v * cos
            dot = 0.36 * pitch
            pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill=255)
    return ImageChops.multiply(body, pattern)


def _edge_colour(rgb: RGB) -> RGB:
    """A neutral tone that stands out from ``rgb``."""
    light = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2]
    return (25, 25, 25) if light > 60 else (235, 235, 235)


def _blank(side: int) -> Mask:
    return Image.new("L", (side, side), 0)


def _paste(image: Image.Image, rgb: RGB, mask: Mask, place: tuple[int, int]) -> None:
    image.paste(rgb, place, mask.reduce(SUPERSAMPLE))
