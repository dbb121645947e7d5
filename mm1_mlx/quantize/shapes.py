"""Drawn pictures with questions that have one right answer: what mm1-tiny learned to do.

One to four shapes, each in a quarter of its own; colours as CSS names them. Drawn by
other means than the pictures it was trained on (``benchmarks/shapes``), in wordings that
it knows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from PIL import Image, ImageDraw

from mm1_mlx.eval.intervals import wilson
from mm1_mlx.models import MM1
from mm1_mlx.prompt import Prompt
from mm1_mlx.tokenizer import Tokenizer

# Whose sources say that they are of this model.
MODEL = "mm1-tiny"
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
BACKGROUNDS = ("white", "lightgrey", "gainsboro", "whitesmoke")
QUESTIONS = 300
MAX_ANSWER = 4
SIZE = 96
# Drawn so much larger, and averaged: edges as smooth as a photograph's.
SMOOTH = 4
CORNERS = ((-1, -1), (1, -1), (1, 1), (-1, 1))


@dataclass(frozen=True)
class Accuracy:
    """How many questions were answered right.

    Attributes:
        right: answers that were the expected word.
        questions: how many were asked.
    """

    right: int
    questions: int

    @property
    def share(self) -> float:
        """Of all, those that were right."""
        return self.right / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share."""
        return wilson(self.right, self.questions)

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "right": self.right,
            "questions": self.questions,
            "share": self.share,
            "interval_95": list(self.interval),
        }


@dataclass(frozen=True)
class Thing:
    """A shape in its colour; the middle and the radius around it in shares of the side."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Case:
    """A picture, a question about it, and the word that answers it."""

    picture: Image.Image
    question: str
    answer: str


def case(seed: int) -> Case:
    """One question; the same for the same seed."""
    things, rng = things_of(seed), _generator(seed, "question")
    asked = [ask(things, rng) for ask in (_colour, _shape, _count, _exists, _where)]
    question, answer = _pick(rng, [pair for pair in asked if pair])
    return Case(_draw(things, _pick(rng, BACKGROUNDS)), question, answer)


def things_of(seed: int) -> list[Thing]:
    """What the picture of a seed shows."""
    rng = _generator(seed, "things")
    things = []
    for quarter in rng.permutation(4)[: rng.integers(1, 5)].tolist():
        radius = float(rng.uniform(0.12, 0.19))
        x, y = (0.25 + 0.5 * side for side in (quarter % 2, quarter // 2))
        dx, dy = rng.uniform(radius - 0.23, 0.23 - radius, 2).tolist()
        colour, shape = _pick(rng, COLOURS), _pick(rng, SHAPES)
        things.append(Thing(colour, shape, x + dx, y + dy, radius))
    return things


def _generator(seed: int, of: str) -> np.random.Generator:
    return np.random.default_rng([seed, *of.encode()])


def score(
    model: MM1,
    tokenizer: Tokenizer,
    questions: int = QUESTIONS,
    progress: Callable[[], None] = lambda: None,
) -> Accuracy:
    """How many of the questions the model answers right, greedily and word for word."""
    right = 0
    for seed in range(questions):
        drawn = case(seed)
        right += _answer(model, tokenizer, drawn) == drawn.answer
        progress()
    return Accuracy(right, questions)


def _answer(model: MM1, tokenizer: Tokenizer, drawn: Case) -> str:
    prompt = Prompt.build(drawn.question, [drawn.picture], model.config, tokenizer)
    tokens = mx.array(prompt.tokens)
    embeddings = model.embed(tokens, model.encode(prompt.pictures), prompt.spans)
    said = []
    for token, _ in generate_step(
        tokens, model, max_tokens=MAX_ANSWER, input_embeddings=embeddings
    ):
        if int(token) in tokenizer.hf.eos_token_ids:
            break
        said.append(int(token))
    return str(tokenizer.hf.decode(said)).strip().lower()


def _pick(rng: np.random.Generator, items: Any) -> Any:
    return items[int(rng.integers(len(items)))]


# Questions: None where the picture leaves the answer open.


def _alone(things: list[Thing], name: str) -> list[Thing]:
    """Those that no other shares a colour, or a shape, with."""
    counts = Counter(getattr(thing, name) for thing in things)
    return [thing for thing in things if counts[getattr(thing, name)] == 1]


def _colour(things: list[Thing], rng: np.random.Generator) -> tuple[str, str] | None:
    alone = _alone(things, "shape")
    if not alone:
        return None
    thing = _pick(rng, alone)
    return f"What colour is the {thing.shape}?", thing.colour


def _shape(things: list[Thing], rng: np.random.Generator) -> tuple[str, str] | None:
    alone = _alone(things, "colour")
    if not alone:
        return None
    thing = _pick(rng, alone)
    return f"Which shape is {thing.colour}?", thing.shape


def _count(things: list[Thing], rng: np.random.Generator) -> tuple[str, str]:
    colour = _pick(rng, (*(thing.colour for thing in things), _pick(rng, COLOURS)))
    number = sum(thing.colour == colour for thing in things)
    if rng.random() < 0.5:
        return "How many shapes are there?", str(len(things))
    return f"How many {colour} shapes are there?", str(number)


def _exists(things: list[Thing], rng: np.random.Generator) -> tuple[str, str]:
    pairs = {(thing.colour, thing.shape) for thing in things}
    absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in pairs]
    there = rng.random() < 0.5
    colour, shape = _pick(rng, sorted(pairs) if there else absent)
    article = "an" if colour[0] in "aeiou" else "a"
    return f"Is there {article} {colour} {shape}?", "yes" if there else "no"


def _where(things: list[Thing], rng: np.random.Generator) -> tuple[str, str] | None:
    named = [
        thing
        for thing in things
        if Counter((t.colour, t.shape) for t in things)[thing.colour, thing.shape] == 1
    ]
    asked = []
    for a, b in permutations(named, 2):
        dx, dy = a.x - b.x, a.y - b.y
        names = f"the {a.colour} {a.shape} relative to the {b.colour} {b.shape}"
        # In the same row or column: else two words would be right.
        if abs(dx) > 2 * abs(dy):
            asked.append((f"Where is {names}?", "left" if dx < 0 else "right"))
        elif abs(dy) > 2 * abs(dx):
            asked.append((f"Where is {names}?", "above" if dy < 0 else "below"))
    return _pick(rng, asked) if asked else None


# Pictures


def _draw(things: list[Thing], background: str) -> Image.Image:
    side = SIZE * SMOOTH
    picture = Image.new("RGB", (side, side), background)
    pen = ImageDraw.Draw(picture)
    for thing in things:
        points = [
            (side * (thing.x + thing.radius * x), side * (thing.y + thing.radius * y))
            for x, y in _outline(thing.shape)
        ]
        pen.polygon(points, fill=thing.colour)
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX)


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners in the unit circle, y pointing down."""
    match shape:
        case "circle":
            return _ring([1.0] * 64)
        case "square":
            return [(x / 2**0.5, y / 2**0.5) for x, y in CORNERS]
        case "triangle":
            return _ring([1.0] * 3)
        case "star":
            return _ring([1.0, 0.42] * 5)
        case "cross":
            ends = [((0.32, 0.95), (0.32, 0.32), (0.95, 0.32))] * 4
            return [
                (x * a, y * b)
                for (x, y), corner in zip(CORNERS, ends, strict=True)
                for a, b in (corner[::-1] if x * y > 0 else corner)
            ]
    turns = (2 * math.pi * i / 48 for i in range(48))
    return [
        (
            0.9 * math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t)) / 17,
        )
        for t in turns
    ]


def _ring(radii: list[float]) -> list[tuple[float, float]]:
    """Points around the middle, from the top on."""
    step = 2 * math.pi / len(radii)
    return [
        (r * math.sin(i * step), -r * math.cos(i * step)) for i, r in enumerate(radii)
    ]
