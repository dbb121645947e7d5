"""The pictures that ship with the embedded model."""

from __future__ import annotations

import io

from benchmarks.shapes.draw import draw
from benchmarks.shapes.scene import Background, Object, Scene

WHITE = (255, 255, 255)
PAPER = (236, 236, 240)


def scenes() -> dict[str, Scene]:
    """File name to scene."""
    star = Object("star", "red", (214, 30, 40), 96, 98, 56, 12, "solid")
    four = (
        Object("circle", "yellow", (250, 205, 20), 62, 66, 30, 0, "solid"),
        Object("heart", "purple", (130, 30, 140), 86, 186, 34, 0, "solid"),
        Object("square", "blue", (30, 70, 220), 178, 74, 30, 20, "solid"),
        Object("triangle", "green", (20, 140, 50), 196, 180, 34, 0, "solid"),
    )
    return {
        "red-star.png": Scene((star,), Background(WHITE, WHITE), 192, 192),
        "four-shapes.png": Scene(four, Background(PAPER, PAPER), 256, 256),
    }


def shipped_pictures() -> dict[str, bytes]:
    """File name to PNG."""
    files = {}
    for name, scene in scenes().items():
        buffer = io.BytesIO()
        draw(scene).save(buffer, format="PNG", optimize=True)
        files[name] = buffer.getvalue()
    return files
