"""A shape and a word that the embedded model has never met, and questions about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from benchmarks.shapes.cases import FIRST_SEED, Case
from benchmarks.shapes.draw import draw
from benchmarks.shapes.questions import COLOUR_TEXTS as COLOUR_OF_TEXTS
from benchmarks.shapes.questions import (
    COUNT_TEXTS,
    EXISTS_TEXTS,
    LONE_SHAPE_TEXTS,
    NUMBERS,
    SHAPE_TEXTS,
    YES_NO,
    caption,
    plural,
    unique,
)
from benchmarks.shapes.scene import (
    ARROW,
    COLOURS,
    FEW,
    SHAPES,
    Scene,
    Split,
    pick,
    random_scene,
    split_rng,
)

KINDS = ("shape", "colour", "exists", "count", "caption")
# How many of a picture's shapes are arrows, each as likely.
ARROWS = (0, 1, 1, 2)


def arrow_scene(
    rng: np.random.Generator, split: Split = "train", arrows: Sequence[int] = ARROWS
) -> Scene:
    """A scene in which as many objects as one of ``arrows`` says are arrows.

    Or all, where there are fewer.
    """
    scene = random_scene(rng, split, counts=FEW)
    places = rng.permutation(len(scene.objects))[: pick(rng, arrows)]
    objects = [
        replace(item, shape=ARROW) if i in places else item
        for i, item in enumerate(scene.objects)
    ]
    return replace(scene, objects=tuple(objects))


def arrow_questions(
    scene: Scene, rng: np.random.Generator
) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """Kind, text, answer and options of what can be asked about arrows."""
    arrows = [item for item in scene.objects if item.shape == ARROW]
    shapes = (*SHAPES, ARROW)
    by_colour = unique(scene, lambda o: o.colour)
    # An arrow or, as often, something else: else "arrow" would always be right.
    wanted = rng.random() < 0.5
    chosen = [o for o in by_colour if (o in arrows) == wanted] or by_colour
    if chosen:
        item = pick(rng, chosen)
        lone = len(scene.objects) == 1 and rng.random() < 0.5
        texts = LONE_SHAPE_TEXTS if lone else SHAPE_TEXTS
        yield "shape", pick(rng, texts).format(colour=item.colour), item.shape, shapes
    if len(arrows) == 1:
        text = pick(rng, COLOUR_OF_TEXTS).format(shape=ARROW)
        yield "colour", text, arrows[0].colour, tuple(COLOURS)
    text = pick(rng, EXISTS_TEXTS).format(thing=f"an {ARROW}")
    yield "exists", text, "yes" if arrows else "no", YES_NO
    text = pick(rng, COUNT_TEXTS).format(things=plural(ARROW))
    yield "count", text, str(len(arrows)), NUMBERS
    if arrows:
        yield "caption", *caption(scene, rng), ()


def arrow_cases(
    number: int, split: Split = "validation", first: int = 0
) -> Iterator[Case]:
    """Questions about so many pictures that training does not show, from ``first`` on."""
    for seed in range(first, first + number):
        rng = split_rng(split, FIRST_SEED + 7_000_000 + seed)
        scene = arrow_scene(rng, split)
        shown = (draw(scene),)
        for kind, text, answer, options in arrow_questions(scene, rng):
            if kind == "caption":
                yield Case(f"arrows, {kind}", shown, text, answer, judge="facts")
                kind = "caption, whole and in order"
            yield Case(f"arrows, {kind}", shown, text, answer, options)
