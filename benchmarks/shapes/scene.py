"""Random scenes of coloured shapes on a plain background, as plain values.

A pair is a colour and a shape. The pairs of ``HELD_OUT`` never appear in the scenes of
the splits ``train`` and ``validation``; every scene of ``held_out`` has at least one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "validation", "held_out"]
Style = Literal["solid", "edged", "outline", "striped", "dotted"]
RGB = tuple[int, int, int]
Pair = tuple[str, str]
Box = tuple[RGB, RGB]
T = TypeVar("T")

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
# What fine-tuning teaches: no scene and no question but its own know of it.
ARROW = "arrow"

# Per colour: what CSS and Pillow call by that name, then the boxes around it, both
# ends included, that people call by it too.
COLOURS: dict[str, tuple[tuple[RGB, ...], tuple[Box, ...]]] = {
    "red": (((255, 0, 0),), (((190, 0, 0), (255, 45, 45)),)),
    "orange": (((255, 165, 0), (255, 140, 0)), (((238, 125, 0), (255, 172, 35)),)),
    "yellow": (((255, 255, 0),), (((240, 225, 0), (255, 255, 80)),)),
    "green": (
        ((0, 128, 0), (0, 255, 0)),
        (((0, 110, 0), (50, 175, 60)), ((0, 175, 0), (80, 255, 80))),
    ),
    "blue": (
        ((0, 0, 255),),
        (((0, 0, 160), (50, 70, 255)), ((20, 80, 210), (70, 145, 255))),
    ),
    "purple": (
        ((128, 0, 128),),
        (((100, 0, 105), (150, 40, 160)), ((115, 15, 150), (155, 50, 200))),
    ),
    "pink": (
        ((255, 192, 203), (255, 105, 180)),
        (((245, 95, 165), (255, 140, 200)), ((245, 145, 175), (255, 195, 213))),
    ),
    "black": (((0, 0, 0),), (((0, 0, 0), (38, 38, 38)),)),
}
NAMED_SHARE = 0.3  # of the objects that have a named value exactly

HELD_OUT: frozenset[Pair] = frozenset(
    {
        ("red", "square"),
        ("orange", "heart"),
        ("yellow", "cross"),
        ("green", "star"),
        ("blue", "triangle"),
        ("purple", "circle"),
        ("pink", "triangle"),
        ("black", "heart"),
    }
)
ALL_PAIRS: tuple[Pair, ...] = tuple((c, s) for c in COLOURS for s in SHAPES)
SEEN_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT)
UNSEEN_PAIRS = tuple(pair for pair in ALL_PAIRS if pair in HELD_OUT)

MAX_OBJECTS = 6
# The long side is what the encoder's input is scaled to, so the least size hangs on it.
MIN_DIAMETER = 0.16
MIN_LINE_DIAMETER = 0.27  # for outlines, stripes and dots
# Of the short side, by the number of objects.
MAX_DIAMETER = {1: 0.62, 2: 0.46, 3: 0.37, 4: 0.33, 5: 0.3, 6: 0.27}
GAP = 0.03
# How many objects a scene has: each as likely.
COUNTS = (1, 2, 2, 3, 3, 4, 4, 5, 6)
FEW = (1, 1, 2, 2, 3, 3, 4, 4)
# CIELAB distance of an object from its background; lines also need a lightness step.
MIN_CONTRAST = 20.0
MIN_LINE_CONTRAST = 40.0
MIN_LINE_LIGHTNESS = 12.0
# CIELAB distance of a colour without a name from every one that has one.
MIN_UNNAMED = 22.0
UNNAMED = "unnamed"

_SEED_KEYS: dict[Split, int] = {"train": 1, "validation": 2, "held_out": 3}


@dataclass(frozen=True)
class Object:
    """One shape; lengths in pixels from the top left corner."""

    shape: str
    colour: str
    rgb: RGB
    x: float
    y: float
    # Of the circle around it.
    radius: float
    # Degrees, clockwise.
    rotation: float
    style: Style
    # 0 to 1: how pointed a star is, how tall a triangle, how thick a cross.
    form: float = 0.5

    @property
    def pair(self) -> Pair:
        """Colour and shape."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Background:
    """A linear gradient from ``start`` to ``stop`` (often equal) with noise on it."""

    start: RGB
    stop: RGB
    # Degrees; 0 runs from left to right.
    angle: float = 0.0
    # Standard deviation, in steps of 1/255, and the seed of the noise.
    noise: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Label:
    """A drawn word or number; lengths in pixels."""

    text: str
    rgb: RGB
    # Of its middle.
    x: float
    y: float
    # Of a capital letter.
    height: float


@dataclass(frozen=True)
class Scene:
    """Objects that do not overlap, from left to right; sizes in pixels."""

    objects: tuple[Object, ...]
    background: Background
    width: int
    height: int
    labels: tuple[Label, ...] = ()


def split_rng(split: Split, seed: int) -> np.random.Generator:
    """The generator of one split's ``seed``; no two splits share a stream."""
    return np.random.default_rng(np.random.SeedSequence([_SEED_KEYS[split], seed]))


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of ``items``, each as likely."""
    return items[int(rng.random() * len(items))]


def random_scene(
    rng: np.random.Generator,
    split: Split = "train",
    short_side: int = 96,
    counts: Sequence[int] = COUNTS,
) -> Scene:
    """As many objects as one of ``counts`` on a canvas of a short side in pixels."""
    width, height = random_canvas(rng, short_side)
    pairs = _random_pairs(rng, split, pick(rng, counts))
    rgbs = [random_rgb(rng, colour) for colour, _ in pairs]
    background = random_background(rng, rgbs)
    places = _random_places(rng, len(pairs), width, height)
    objects = [
        _random_object(rng, pair, rgb, place, background, max(width, height))
        for pair, rgb, place in zip(pairs, rgbs, places, strict=True)
    ]
    return Scene(
        tuple(sorted(objects, key=lambda o: (o.x, o.y))), background, width, height
    )


def random_rgb(rng: np.random.Generator, colour: str) -> RGB:
    """A value that people call ``colour``."""
    named, boxes = COLOURS[colour]
    if rng.random() < NAMED_SHARE:
        return pick(rng, named)
    low, high = pick(rng, boxes)
    r, g, b = (
        a + int(rng.random() * (z - a + 1)) for a, z in zip(low, high, strict=True)
    )
    return r, g, b


def recolour(scene: Scene, share: float, rng: np.random.Generator) -> Scene:
    """The scene with a share of its objects in colours that have no name here.

    Else a colour would only ever be seen on the shapes it is not held out from, and an
    encoder would learn shapes colour by colour. Nothing that people might call by one
    of the names is used: a held-out pair stays unseen.
    """
    objects = [
        replace(item, colour=UNNAMED, rgb=unnamed_rgb(scene.background, rng))
        if rng.random() < share
        else item
        for item in scene.objects
    ]
    return replace(scene, objects=tuple(objects))


def unnamed_rgb(background: Background, rng: np.random.Generator) -> RGB:
    """A value far from every named colour and from the background."""
    while True:
        r, g, b = (int(c) for c in rng.integers(0, 256, 3))
        rgb = r, g, b
        if not _is_named(rgb) and background_contrast(rgb, background) >= MIN_CONTRAST:
            return rgb


def _is_named(rgb: RGB) -> bool:
    """Whether people might call the value by one of the names."""
    named, low, high = _named_values()
    if (np.linalg.norm(named - _lab(rgb), axis=1) < MIN_UNNAMED).any():
        return True
    return bool(((low <= rgb) & (rgb <= high)).all(axis=1).any())


@cache
def _named_values() -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """CIELAB of the named values and boxes' corners; the boxes' low and high ends."""
    values = [value for named, _ in COLOURS.values() for value in named]
    boxes = [box for _, boxes in COLOURS.values() for box in boxes]
    for box in boxes:
        values += [(r, g, b) for r, g, b in product(*zip(*box, strict=True))]
    low, high = (np.array(ends) for ends in zip(*boxes, strict=True))
    return np.array([_lab(value) for value in values]), low, high


def contrast(a: RGB, b: RGB) -> float:
    """Distance of two colours in CIELAB (CIE 1976), 0 to about 260."""
    return math.dist(_lab(a), _lab(b))


def background_contrast(rgb: RGB, background: Background) -> float:
    """Least contrast of ``rgb`` with the two ends and the middle of the background."""
    return min(contrast(rgb, tone) for tone in _tones(background))


def _tones(background: Background) -> tuple[RGB, RGB, RGB]:
    start, stop = background.start, background.stop
    r, g, b = ((p + q) // 2 for p, q in zip(start, stop, strict=True))
    return start, (r, g, b), stop


def _lab(rgb: RGB) -> tuple[float, float, float]:
    """CIELAB of sRGB under D65: lightness 0 to 100, then a and b."""
    r, g, b = (
        c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb
    )
    x, y, z = (
        t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116
        for t in (
            (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
            0.2126 * r + 0.7152 * g + 0.0722 * b,
            (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
        )
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def random_canvas(rng: np.random.Generator, short_side: int) -> tuple[int, int]:
    if rng.random() < 0.7:
        return short_side, short_side
    long_side = round(short_side * rng.uniform(1.0, 1.5))
    return (short_side, long_side) if rng.random() < 0.5 else (long_side, short_side)


def _random_pairs(rng: np.random.Generator, split: Split, count: int) -> list[Pair]:
    """Pairs of a scene, often sharing a colour or shape, so that counts vary."""
    pool = ALL_PAIRS if split == "held_out" else SEEN_PAIRS
    first = pick(rng, UNSEEN_PAIRS if split == "held_out" else SEEN_PAIRS)
    mode = rng.random()
    if mode < 0.15:
        pool = tuple(p for p in pool if p[0] == first[0])
    elif mode < 0.30:
        pool = tuple(p for p in pool if p[1] == first[1])
    pairs = [first]
    while len(pairs) < count:
        # Twins: the same pair again; of a small pool all there is left.
        again = (mode > 0.85 and rng.random() < 0.5) or len(pairs) >= len(pool)
        pair = pick(rng, pairs) if again else pick(rng, pool)
        if again or pair not in pairs:
            pairs.append(pair)
    return pairs


def random_background(rng: np.random.Generator, rgbs: Sequence[RGB]) -> Background:
    for _ in range(20):
        background = any_background(rng)
        if all(background_contrast(rgb, background) >= MIN_CONTRAST for rgb in rgbs):
            return background
    # Every colour is far enough from white.
    return Background((255, 255, 255), (255, 255, 255))


def any_background(rng: np.random.Generator) -> Background:
    kind = rng.random()
    if kind < 0.25:
        return Background((255, 255, 255), (255, 255, 255))
    if kind < 0.45:
        grey = _grey(rng, 195, 245)
        return Background(grey, grey)
    if kind < 0.60:
        grey = _grey(rng, 100, 170)
        return Background(grey, grey)
    start = _light(rng)
    if kind < 0.72:
        return Background(start, start)
    if kind < 0.86:
        return Background(start, _light(rng), rng.uniform(0, 360))
    noise = rng.uniform(3, 12)
    return Background(start, start, 0.0, noise, int(rng.integers(2**31)))


def _grey(rng: np.random.Generator, low: int, high: int) -> RGB:
    level = low + int(rng.random() * (high - low + 1))
    return level, level, level


def _light(rng: np.random.Generator) -> RGB:
    """A pastel, or now and then a light grey."""
    if rng.random() < 0.3:
        return _grey(rng, 190, 255)
    r, g, b = (190 + int(rng.random() * 66) for _ in range(3))
    return r, g, b


def _random_places(
    rng: np.random.Generator, count: int, width: int, height: int
) -> list[tuple[float, float, float]]:
    """``x, y, radius`` of ``count`` circles that keep apart, inside the canvas."""
    short, long = min(width, height), max(width, height)
    low, high = MIN_DIAMETER * long / 2, MAX_DIAMETER[count] * short / 2
    places: list[tuple[float, float, float]] = []
    while len(places) < count:
        places = []
        for _ in range(30 * count):
            radius = low + (high - low) * rng.random()
            edge = radius + 0.01 * short
            x = edge + (width - 2 * edge) * rng.random()
            y = edge + (height - 2 * edge) * rng.random()
            if all(
                math.hypot(x - a, y - b) > radius + r + GAP * short
                for a, b, r in places
            ):
                places.append((x, y, radius))
            if len(places) == count:
                break
    return places


def _random_object(
    rng: np.random.Generator,
    pair: Pair,
    rgb: RGB,
    place: tuple[float, float, float],
    background: Background,
    long_side: int,
) -> Object:
    upright = rng.random() < 0.5
    rotation = rng.uniform(-8, 8) if upright else rng.uniform(0, 360)
    style = _random_style(rng, rgb, 2 * place[2] / long_side, background)
    return Object(pair[1], pair[0], rgb, *place, rotation, style, rng.random())


def _random_style(
    rng: np.random.Generator, rgb: RGB, diameter: float, background: Background
) -> Style:
    """Solid, or, where the shape is large and clear enough for it, something else."""
    kind = rng.random()
    if kind < 0.6:
        return "solid"
    if kind < 0.7:
        return "edged"
    lightness = _lab(rgb)[0]
    step = min(abs(lightness - _lab(tone)[0]) for tone in _tones(background))
    if (
        diameter < MIN_LINE_DIAMETER
        or step < MIN_LINE_LIGHTNESS
        or background_contrast(rgb, background) < MIN_LINE_CONTRAST
    ):
        return "solid"
    return "outline" if kind < 0.84 else "striped" if kind < 0.93 else "dotted"
