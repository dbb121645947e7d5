"""Drawn words and numbers: which there are, and pictures that show them.

Letters are capitals. No training picture shows a word or number of the held-out ones;
most that it shows are letters in any order, so that a model reads and does not guess.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np

from benchmarks.shapes.scene import (
    RGB,
    Background,
    Label,
    Object,
    Scene,
    Split,
    any_background,
    background_contrast,
    pick,
    random_canvas,
    random_scene,
)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
CHARACTERS = LETTERS + DIGITS
MAX_LENGTH = 5
_LISTED = """
ACORN ALARM APPLE ARROW BACON BAKER BANK BARN BEACH BEAR BELL BIRD BOAT BOOK BREAD
BRICK BUS CAFE CAKE CAMP CAR CARD CAT CHAIR CITY CLOCK CLOUD COAT COIN CORN COW CUP
DANCE DESK DOG DOOR DRUM DUCK EAGLE EARTH EXIT FARM FISH FLAG FLUTE FORK FOX FROG
FRUIT GAME GATE GIFT GLASS GOAT GOLD GRAPE GRASS HALL HAND HAT HILL HOME HORSE
HOTEL HOUSE ICE INK IRON ISLE JAM JAR JEEP JUICE KEY KING KITE KNIFE LAKE LAMP LEAF
LEMON LIFT LION LOCK MAP MELON METRO MILK MOON MOUSE MUSIC NEST NIGHT NORTH NUT
OCEAN OLIVE ONION OPEN ORBIT OWL PAINT PAPER PARK PEAR PEN PIANO PILOT PIZZA PLANE
PLUM PORT POST QUEEN QUIET RADIO RAIN RICE RING RIVER ROAD ROBOT ROCK ROOF ROSE SALT
SAND SCARF SEA SHEEP SHIP SHOE SHOP SILK SNOW SOAP SOUP SPOON STAMP STONE SUGAR SUN
SWAN TABLE TAXI TEA TENT TIGER TOAST TOWER TRAIN TREE TRUCK VASE VIOLA WATER WHALE
WHEEL WIND WOLF WOOD YACHT ZEBRA ZERO ZONE ZOO
"""
WORDS = tuple(_LISTED.split())
HELD_OUT_WORDS = WORDS[::5]
# Numbers of two digits or more that leave this rest are held out.
NUMBER_MODULUS, HELD_OUT_REST = 7, 3

Kind = Literal["word", "number"]
# Height of capitals as a share of the picture's short side: read at a glance, or only at
# twice the resolution.
LARGE = (0.13, 0.26)
SMALL = (0.062, 0.085)
# Of what the encoder can tell apart of a letter, in pixels of its input.
MIN_LEGIBLE = 8.0
# A letter's width with its gap, in heights of a capital, at most; the font's widest.
_ADVANCE = 1.2
MIN_LABEL_CONTRAST = 45.0


def random_text(rng: np.random.Generator, kind: Kind, split: Split) -> str:
    """A word or number that the split may show."""
    if kind == "number":
        return _random_number(rng, split)
    if split == "held_out":
        return pick(rng, HELD_OUT_WORDS)
    if rng.random() < 0.3:
        return pick(rng, [word for word in WORDS if word not in HELD_OUT_WORDS])
    while True:
        length = int(rng.integers(2, MAX_LENGTH + 1))
        word = "".join(pick(rng, LETTERS) for _ in range(length))
        if word not in HELD_OUT_WORDS:
            return word


def _random_number(rng: np.random.Generator, split: Split) -> str:
    while True:
        length = int(rng.integers(1 if split != "held_out" else 2, MAX_LENGTH))
        first = DIGITS[1:] if length > 1 else DIGITS
        number = pick(rng, first) + "".join(
            pick(rng, DIGITS) for _ in range(length - 1)
        )
        if (split == "held_out") == is_held_out(number):
            return number


def is_held_out(text: str) -> bool:
    """Whether no training picture shows the word or number."""
    if not text.isdigit():
        return text in HELD_OUT_WORDS
    return len(text) > 1 and int(text) % NUMBER_MODULUS == HELD_OUT_REST


def writing_scene(
    rng: np.random.Generator,
    split: Split = "train",
    short_side: int = 96,
    heights: tuple[float, float] = LARGE,
    objects: bool = True,
) -> Scene:
    """One or two labels, a word and a number where there are two, and often shapes."""
    kinds: tuple[Kind, ...] = pick(
        rng, (("word",), ("word",), ("number",), ("word", "number"))
    )
    texts = [random_text(rng, kind, split) for kind in kinds]
    scene = _paper(rng, short_side)
    if objects and rng.random() < 0.5:
        scene = random_scene(rng, split, short_side, (1, 2, 3))
    labels: list[Label] = []
    while len(labels) < len(texts):
        labels = []
        for text in texts:
            label = _place(rng, text, scene, heights)
            if any(_touch(label, other) for other in labels):
                break
            labels.append(label)
    clear = [o for o in scene.objects if not any(_covers(label, o) for label in labels)]
    return replace(scene, objects=tuple(clear), labels=tuple(labels))


def _paper(rng: np.random.Generator, short_side: int) -> Scene:
    width, height = random_canvas(rng, short_side)
    return Scene((), any_background(rng), width, height)


def _place(
    rng: np.random.Generator,
    text: str,
    scene: Scene,
    heights: tuple[float, float],
) -> Label:
    height = min(scene.width, scene.height) * rng.uniform(*heights)
    # What does not fit across is written smaller.
    height = min(height, 0.94 * scene.width / (_ADVANCE * len(text)))
    across, down = extent(text, height)
    x = across / 2 + (scene.width - across) * rng.random()
    y = down / 2 + (scene.height - down) * rng.random()
    return Label(text, _ink(rng, scene.background), x, y, height)


def _ink(rng: np.random.Generator, background: Background) -> RGB:
    while True:
        r, g, b = (int(c) for c in rng.integers(0, 256, 3))
        dark = rng.random() < 0.6
        rgb: RGB = (r // 5, g // 5, b // 5) if dark else (r, g, b)
        if background_contrast(rgb, background) >= MIN_LABEL_CONTRAST:
            return rgb


def extent(text: str, height: float) -> tuple[float, float]:
    """Width and height, at most, of a label and some room around it."""
    return (_ADVANCE * len(text) + 0.2) * height, 1.5 * height


def _touch(a: Label, b: Label) -> bool:
    (w, h), (v, g) = extent(a.text, a.height), extent(b.text, b.height)
    return abs(a.x - b.x) < (w + v) / 2 and abs(a.y - b.y) < (h + g) / 2


def _covers(label: Label, item: Object) -> bool:
    across, down = extent(label.text, label.height)
    dx = max(0.0, abs(item.x - label.x) - across / 2)
    dy = max(0.0, abs(item.y - label.y) - down / 2)
    return math.hypot(dx, dy) < item.radius
