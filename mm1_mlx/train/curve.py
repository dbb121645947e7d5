"""A run's log as a picture: the mean loss of every line, smoothed, and held-out losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

SIZE = (960, 540)
LEFT, TOP, RIGHT, BOTTOM = 80, 40, 24, 56
INK, GRID, PALE, LINE, DOTS = "#222222", "#e2e2e2", "#a9c7ea", "#1f5fae", "#d1571b"
# Of the smoothed loss: the share of the run away at which a step counts half.
HALF_LIFE = 0.02
MOST_TICKS = 7


def draw_curve(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a log's lines as a PNG; nothing where none has a loss that is finite."""
    losses, held_out = (_points(lines, name) for name in ("loss", "valid_loss"))
    if not losses:
        return
    points = [*losses, *held_out]
    first, last = (f(step for step, _ in points) for f in (min, max))
    low, high = (f(loss for _, loss in points) for f in (min, max))
    steps, values = _ticks(first, last), _ticks(low, high)
    low, high = min(low, values[0]), max(high, values[-1])

    def place(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + (step - first) / max(last - first, 1) * (SIZE[0] - LEFT - RIGHT)
        y = TOP + (high - loss) / ((high - low) or 1) * (SIZE[1] - TOP - BOTTOM)
        return x, y

    image = Image.new("RGB", SIZE, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    for value in values:
        y = place(first, value)[1]
        draw.line([(LEFT, y), (SIZE[0] - RIGHT, y)], GRID)
        draw.text((LEFT - 10, y), f"{value:g}", INK, font, anchor="rm")
    for step in steps:
        x = place(step, low)[0]
        draw.line([(x, TOP), (x, SIZE[1] - BOTTOM)], GRID)
        draw.text((x, SIZE[1] - BOTTOM + 8), f"{step:,g}", INK, font, anchor="mt")
    draw.line([place(*point) for point in losses], PALE, 2, joint="curve")
    smooth = [place(*point) for point in _smoothed(losses)]
    draw.line(smooth, LINE, 3, joint="curve")
    _dot(draw, smooth[-1], LINE)
    if held_out:
        draw.line([place(*point) for point in held_out], DOTS, 2, joint="curve")
    for point in held_out:
        _dot(draw, place(*point), DOTS)
    middle = (LEFT + SIZE[0] - RIGHT) / 2
    draw.text((middle, SIZE[1] - 12), "step", INK, font, anchor="mb")
    draw.text((LEFT, 12), "loss, nats per token", LINE, font)
    if held_out:
        draw.text((LEFT + 170, 12), "held out", DOTS, font)
    image.save(path)


def _points(lines: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Step and value of the lines that have a finite one of this name."""
    found = [(x["step"], x[name]) for x in lines if x.get(name) is not None]
    return [point for point in found if math.isfinite(point[1])]


def _dot(draw: ImageDraw.ImageDraw, at: tuple[float, float], colour: str) -> None:
    x, y = at
    draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The mean of the losses around each step, the nearer the heavier."""
    keep = 0.5 ** (1 / max(1.0, HALF_LIFE * len(points)))

    def sums(losses: Sequence[float]) -> list[tuple[float, float]]:
        total, weight, found = 0.0, 0.0, []
        for loss in losses:
            found.append((total, weight))
            total, weight = keep * (total + loss), keep * (weight + 1)
        return found

    losses = [loss for _, loss in points]
    before, behind = sums(losses), reversed(sums(losses[::-1]))
    return [
        (step, (total + loss + rest) / (weight + 1 + others))
        for (step, loss), (total, weight), (rest, others) in zip(
            points, before, behind, strict=True
        )
    ]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from about ``low`` to about ``high``, evenly apart."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / MOST_TICKS))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= MOST_TICKS)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)] or [low]
