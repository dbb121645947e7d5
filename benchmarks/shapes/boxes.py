"""Grounding: the box of what a question names, written as ``mm1_mlx.grounding`` reads it."""

from __future__ import annotations

import numpy as np

from benchmarks.shapes.draw import corners
from benchmarks.shapes.questions import Question, distinct, focus_of, name_of
from benchmarks.shapes.scene import Object, Scene, pick

# What coordinates count to, and the step in which they are written.
RANGE, STEP = 1000, 10

BOX_TEXTS = (
    "Where exactly is the {a}? Give its box.",
    "Find the {a} and give its bounding box.",
    "What is the bounding box of the {a}?",
    "Locate the {a}.",
    "Give the box of the {a}.",
)


def ask_box(scene: Scene, rng: np.random.Generator) -> Question | None:
    """The box of an object that one name fits alone."""
    focus = focus_of(scene)
    found = [item for item in distinct(scene) if item in focus]
    if not found:
        return None
    target = pick(rng, found)
    name = name_of(scene, target, rng)
    numbers = ", ".join(str(x) for x in box_of(target, scene))
    text = pick(rng, BOX_TEXTS).format(a=name)
    return Question("box", text, f"The {name} [{numbers}].", (), target)


def box_of(item: Object, scene: Scene) -> tuple[int, int, int, int]:
    """Left, top, right, bottom, as if the picture were 1000 by 1000, in steps of 10."""
    points = corners(item)
    low, high = points.min(axis=0), points.max(axis=0)
    edges = (
        low[0] / scene.width,
        low[1] / scene.height,
        high[0] / scene.width,
        high[1] / scene.height,
    )
    left, top, right, bottom = (
        min(RANGE, max(0, STEP * round(RANGE * edge / STEP))) for edge in edges
    )
    return left, top, right, bottom
