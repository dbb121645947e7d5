"""Questions with one-word answers, and captions, that are true of a scene.

In a scene with held-out pairs, every question about a pair is about one of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.shapes.scene import (
    COLOURS,
    HELD_OUT,
    MAX_OBJECTS,
    SEEN_PAIRS,
    SHAPES,
    UNNAMED,
    UNSEEN_PAIRS,
    Object,
    Pair,
    Scene,
    pick,
)

Kind = Literal[
    "colour", "shape", "count", "exists", "where", "place", "box", "read", "compare"
]
KINDS: tuple[Kind, ...] = ("colour", "shape", "count", "exists", "where")

YES_NO = ("yes", "no")
NUMBERS = tuple(str(n) for n in range(MAX_OBJECTS + 1))
# From two on.
NUMBER_WORDS = ("two", "three", "four", "five", "six")
ACROSS, ALONG = ("left", "right"), ("above", "below")
# How much larger the displacement along one axis has to be.
DOMINANCE = 1.5
# How far from the middle an object has to be, as a share of the picture's side.
CLEAR_OF_MIDDLE = 0.1
# Large counts are rare in scenes, so they are asked for more often where they occur.
_COUNT_WEIGHTS = {"0": 0.7, "1": 0.7, "2": 1.2, "3": 1.7, "4": 2.5, "5": 4.0, "6": 8.0}

COLOUR_TEXTS = (
    "What colour is the {shape}?",
    "What color is the {shape}?",
    "Which colour is the {shape}?",
    "Which color does the {shape} have?",
    "What is the colour of the {shape}?",
    "The {shape} has which colour?",
)
LONE_COLOUR_TEXTS = (
    "What colour is it?",
    "What color is it?",
    "What colour is this?",
    "What color is this shape?",
    "What colour is the shape?",
    "Which colour is the object?",
)
SHAPE_TEXTS = (
    "Which shape is {colour}?",
    "What shape is {colour}?",
    "What shape is the {colour} object?",
    "What shape is the {colour} one?",
    "What is the shape of the {colour} object?",
    "What is the {colour} shape?",
)
LONE_SHAPE_TEXTS = (
    "What shape is it?",
    "What shape is this?",
    "Which shape is this?",
    "What is the shape of the object?",
    "Which shape do you see?",
    "What kind of shape is this?",
)
COUNT_TEXTS = (
    "How many {things} are there?",
    "How many {things} do you see?",
    "How many {things} are in the picture?",
    "How many {things} can you see in the image?",
    "Count the {things}.",
)
EXISTS_TEXTS = (
    "Is there {thing}?",
    "Do you see {thing}?",
    "Is there {thing} in the picture?",
    "Can you see {thing}?",
    "Does the image show {thing}?",
    "Is {thing} in the image?",
)
WHERE_TEXTS = (
    "Where is the {a} relative to the {b}?",
    "Where is the {a} compared to the {b}?",
    "Where is the {a}, seen from the {b}?",
    "On which side of the {b} is the {a}?",
)
EITHER_TEXTS = {
    ACROSS: (
        "Is the {a} left or right of the {b}?",
        "Is the {a} to the left or to the right of the {b}?",
    ),
    ALONG: (
        "Is the {a} above or below the {b}?",
        "Is the {a} above the {b} or below it?",
    ),
}
CLAIM_TEXTS = {
    "left": ("Is the {a} left of the {b}?", "Is the {a} to the left of the {b}?"),
    "right": ("Is the {a} right of the {b}?", "Is the {a} to the right of the {b}?"),
    "above": ("Is the {a} above the {b}?", "Is the {a} higher than the {b}?"),
    "below": ("Is the {a} below the {b}?", "Is the {a} lower than the {b}?"),
}
_SIDES = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
PLACE_TEXTS = {
    ACROSS: (
        "Is the {a} on the left or on the right?",
        "Is the {a} in the left or in the right half?",
    ),
    ALONG: (
        "Is the {a} above or below the middle?",
        "Is the {a} above the middle of the picture or below it?",
    ),
}
CAPTION_TEXTS = (
    "Describe the picture.",
    "Describe this image.",
    "What is in the picture?",
    "What do you see?",
    "What does the image show?",
    "List the shapes in the picture.",
)
LONE_CAPTION_TEXTS = (*CAPTION_TEXTS, "What is this?", "What is it?")


@dataclass(frozen=True)
class Question:
    """A question about one scene."""

    kind: Kind
    text: str
    # One word in lower case, or a digit.
    answer: str
    # The answers that the question leaves open, ``answer`` among them.
    options: tuple[str, ...]
    # The object asked about, or the first of the two, where there is one.
    target: Object | None = None
    # The answer as a sentence.
    sentence: str = ""


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One question of every kind that the scene can answer unambiguously."""
    makers = (ask_colour, ask_shape, ask_count, ask_exists, ask_where)
    asked = (maker(scene, rng) for maker in makers)
    return [question for question in asked if question is not None]


def ask_colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    """The colour of the only object of its shape."""
    targets = unique(scene, lambda o: o.shape)
    if not targets:
        return None
    target = pick(rng, targets)
    lone = len(scene.objects) == 1 and rng.random() < 0.5
    text = pick(rng, LONE_COLOUR_TEXTS if lone else COLOUR_TEXTS)
    text = text.format(shape=target.shape)
    sentence = f"The {target.shape} is {target.colour}."
    return Question("colour", text, target.colour, tuple(COLOURS), target, sentence)


def ask_shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    """The shape of the only object of its colour."""
    targets = unique(scene, lambda o: o.colour)
    if not targets:
        return None
    target = pick(rng, targets)
    lone = len(scene.objects) == 1 and rng.random() < 0.5
    text = pick(rng, LONE_SHAPE_TEXTS if lone else SHAPE_TEXTS)
    text = text.format(colour=target.colour)
    sentence = f"The {target.colour} shape is {article(target.shape)}."
    return Question("shape", text, target.shape, SHAPES, target, sentence)


def ask_count(scene: Scene, rng: np.random.Generator) -> Question:
    """How many objects there are: of a colour, of a shape, of both, or in all."""
    by_answer: dict[str, list[str]] = {}
    for number, things in _countable(scene, rng):
        by_answer.setdefault(str(number), []).append(things)
    numbers = sorted(by_answer)
    weights = np.array([_COUNT_WEIGHTS[number] for number in numbers])
    answer = numbers[int(rng.choice(len(numbers), p=weights / weights.sum()))]
    things = pick(rng, by_answer[answer])
    text = pick(rng, COUNT_TEXTS).format(things=things)
    sentence = f"The number of {things} is {answer}."
    return Question("count", text, answer, NUMBERS, None, sentence)


def ask_exists(scene: Scene, rng: np.random.Generator) -> Question:
    """Whether a pair, a colour or a shape is there; yes and no are as likely."""
    answer = pick(rng, YES_NO)
    detail = rng.random()
    if detail < 0.15:
        thing = _name_that(answer, scene, rng, tuple(COLOURS), lambda o: o.colour)
        phrase = pick(rng, (f"{article(thing)} object", f"{article(thing)} shape"))
    elif detail < 0.35 and (answer == "yes" or _lacks_shape(scene)):
        thing = _name_that(answer, scene, rng, SHAPES, lambda o: o.shape)
        phrase = article(thing)
    else:
        pair = (
            _present_pair(scene, rng) if answer == "yes" else _absent_pair(scene, rng)
        )
        phrase = article(" ".join(pair))
    text = pick(rng, EXISTS_TEXTS).format(thing=phrase)
    bare = phrase.split(" ", 1)[1]
    sentence = f"Yes, there is {phrase}." if answer == "yes" else f"No, no {bare}."
    return Question("exists", text, answer, YES_NO, None, sentence)


def ask_where(scene: Scene, rng: np.random.Generator) -> Question | None:
    """On which side of another object an object is, as seen in the picture."""
    choices = _relations(scene)
    axis = pick(rng, (ACROSS, ALONG))
    choices = [c for c in choices if c[2] in axis] or choices
    if not choices:
        return None
    a, b, side = pick(rng, choices)
    axis = ACROSS if side in ACROSS else ALONG
    names = {"a": name_of(scene, a, rng), "b": name_of(scene, b, rng)}
    sentence = f"The {names['a']} is {_SIDES[side]} the {names['b']}."
    form = rng.random()
    if form < 0.2:
        claim = pick(rng, axis)
        text = pick(rng, CLAIM_TEXTS[claim]).format(**names)
        answer = "yes" if claim == side else "no"
        sentence = f"{answer.capitalize()}, the {sentence[4:]}"
        return Question("where", text, answer, YES_NO, a, sentence)
    if form < 0.4:
        text = pick(rng, EITHER_TEXTS[axis]).format(**names)
        return Question("where", text, side, axis, a, sentence)
    text = pick(rng, WHERE_TEXTS).format(**names)
    return Question("where", text, side, (*ACROSS, *ALONG), a, sentence)


def ask_place(scene: Scene, rng: np.random.Generator) -> Question | None:
    """In which half of the picture an object is.

    The step before ``ask_where``; for training, no part of ``questions``.
    """
    found = distinct(scene)
    if not found:
        return None
    target = pick(rng, found)
    axis = pick(rng, (ACROSS, ALONG))
    share = target.x / scene.width if axis is ACROSS else target.y / scene.height
    if abs(share - 0.5) < CLEAR_OF_MIDDLE:
        return None
    text = pick(rng, PLACE_TEXTS[axis]).format(a=name_of(scene, target, rng))
    return Question("place", text, axis[share > 0.5], axis, target)


def caption(scene: Scene, rng: np.random.Generator | None = None) -> tuple[str, str]:
    """An instruction and the sentence that lists every object, from left to right.

    Equal pairs are counted where the first of them stands: ``Two red stars and a blue
    circle.`` Without ``rng`` the instruction is always the same.
    """
    texts = LONE_CAPTION_TEXTS if len(scene.objects) == 1 else CAPTION_TEXTS
    instruction = pick(rng, texts) if rng else texts[0]
    counts = Counter(item.pair for item in scene.objects)
    parts = [_counted(number, pair) for pair, number in counts.items()]
    listed = ", ".join(parts[:-1]) + " and " + parts[-1] if parts[1:] else parts[0]
    return instruction, listed[0].upper() + listed[1:] + "."


def plural(shape: str) -> str:
    """``shape`` in the plural."""
    return shape + ("es" if shape == "cross" else "s")


# Of every shape's noun, singular or plural, the shape.
SHAPE_OF = {noun: shape for shape in SHAPES for noun in (shape, plural(shape))}


def side_of(a: Object, b: Object) -> str | None:
    """Where ``a`` is as seen from ``b``; None if neither axis clearly dominates."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= DOMINANCE * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) >= DOMINANCE * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def focus_of(scene: Scene) -> list[Object]:
    """The objects that may be asked about: the held-out ones, or else all."""
    held_out = [item for item in scene.objects if item.pair in HELD_OUT]
    return held_out or list(scene.objects)


def unique(scene: Scene, key: Callable[[Object], str | Pair]) -> list[Object]:
    counts = Counter(key(item) for item in scene.objects)
    return [item for item in focus_of(scene) if counts[key(item)] == 1]


def _countable(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[int, str]]:
    noun = pick(rng, ("shapes", "objects"))
    yield len(scene.objects), noun
    colours = Counter(item.colour for item in scene.objects)
    shapes = Counter(item.shape for item in scene.objects)
    for colour in (*colours, pick(rng, tuple(COLOURS))):
        yield colours[colour], f"{colour} {noun}"
    for shape in (*shapes, pick(rng, SHAPES)):
        yield shapes[shape], plural(shape)
    for pair, number in Counter(item.pair for item in focus_of(scene)).items():
        yield number, f"{pair[0]} {plural(pair[1])}"
    yield 0, "{} {}".format(*_absent_pair(scene, rng, plural))


def _name_that(
    answer: str,
    scene: Scene,
    rng: np.random.Generator,
    names: Sequence[str],
    key: Callable[[Object], str],
) -> str:
    """A colour or shape of the scene for ``yes``, one that it lacks for ``no``."""
    if answer == "yes":
        return key(pick(rng, focus_of(scene)))
    present = {key(item) for item in scene.objects}
    return pick(rng, [name for name in names if name not in present])


def _lacks_shape(scene: Scene) -> bool:
    return len({item.shape for item in scene.objects}) < len(SHAPES)


def _present_pair(scene: Scene, rng: np.random.Generator) -> Pair:
    return pick(rng, focus_of(scene)).pair


def _absent_pair(
    scene: Scene, rng: np.random.Generator, name: Callable[[str], str] = str
) -> Pair:
    """A pair that is not there, most often one whose parts are, on other objects."""
    present = {item.pair for item in scene.objects}
    colours = {colour for colour, _ in present}
    shapes = {shape for _, shape in present}
    # Pairs of the same kind as those that a yes is about: the text tells nothing.
    pool = SEEN_PAIRS if present.isdisjoint(HELD_OUT) else UNSEEN_PAIRS
    absent = [pair for pair in pool if pair not in present]
    near = [p for p in absent if p[0] in colours or p[1] in shapes]
    both = [p for p in absent if p[0] in colours and p[1] in shapes]
    chance = rng.random()
    group = both if chance < 0.5 else near if chance < 0.85 else absent
    colour, shape = pick(rng, group or near or absent)
    return colour, name(shape)


def _relations(scene: Scene) -> list[tuple[Object, Object, str]]:
    items = distinct(scene)
    focus = focus_of(scene)
    found = []
    for a in items:
        for b in items:
            side = side_of(a, b)
            if a is not b and side is not None and (a in focus or b in focus):
                found.append((a, b, side))
    return found


def distinct(scene: Scene) -> list[Object]:
    """The objects whose pair of colour and shape no other has."""
    counts = Counter(item.pair for item in scene.objects)
    return [item for item in scene.objects if counts[item.pair] == 1]


def name_of(scene: Scene, item: Object, rng: np.random.Generator) -> str:
    """Words that only ``item`` in the scene answers to."""
    short = rng.random()
    # The colour says nothing where it has no name.
    only_shape = 1.0 if item.colour == UNNAMED else 0.15
    if short < only_shape and [o.shape for o in scene.objects].count(item.shape) == 1:
        return item.shape
    if short > 0.85 and [o.colour for o in scene.objects].count(item.colour) == 1:
        return f"{item.colour} {pick(rng, ('object', 'shape'))}"
    return f"{item.colour} {item.shape}"


def _counted(number: int, pair: Pair) -> str:
    colour, shape = pair
    if number == 1:
        return article(f"{colour} {shape}")
    return f"{NUMBER_WORDS[number - 2]} {colour} {plural(shape)}"


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
