"""What a point is asked: a prompt, and texts of which one may stand behind it.

Of pictures that training never uses, other ones for every seed of a run; the pairs of
colour and shape in them, and in the texts, are ones that training shows, since no lesson
is about new ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from benchmarks.lessons.documents import (
    LISTED,
    NAMES,
    lesson_scene,
    listed,
    some_pairs,
)
from benchmarks.lessons.points import Measure
from benchmarks.shapes.draw import draw
from benchmarks.shapes.questions import caption, questions
from benchmarks.shapes.scene import (
    COLOURS,
    SEEN_PAIRS,
    SHAPES,
    Pair,
    Scene,
    pick,
    split_rng,
)

# Cases' streams begin here, one for every measure.
FIRST_SEED, SEEDS_EACH = 9_000_000, 100_000
# Objects of a picture whose caption is to be found; of fewer nearly all are.
CROWDED = (3, 4)
# Things in a text: of one alone there are so few that training says most of them.
TOLD = (2, 3)
KNOWN = frozenset(SEEN_PAIRS)
# A picture, or a text.
Part = Image.Image | str


@dataclass(frozen=True)
class Case:
    """A prompt and its texts.

    Attributes:
        kind: of question.
        parts: the prompt, in order.
        texts: of which one is right, as training writes them.
        right: its place among them.
    """

    kind: str
    parts: tuple[Part, ...]
    texts: tuple[str, ...]
    right: int


def cases_of(measure: Measure, number: int, seed: int = 0) -> Iterator[Case]:
    """Cases of so many pictures, or texts, that a seed of runs is asked."""
    assert number <= SEEDS_EACH
    maker = {
        "answers": _answers,
        "zero-shot": _zero_shot,
        "few-shot": _few_shot,
        "text": _text,
    }[measure]
    order = ("answers", "zero-shot", "few-shot", "text").index(measure)
    first = FIRST_SEED + (4 * seed + order) * SEEDS_EACH
    for i in range(number):
        yield from maker(split_rng("validation", first + i))


def _answers(rng: np.random.Generator) -> Iterator[Case]:
    """A question of each kind about a picture."""
    scene = lesson_scene(rng, "validation")
    shown = draw(scene)
    for q in questions(scene, rng):
        texts = tuple(f" {option}" for option in q.options)
        yield Case(q.kind, (shown, q.text), texts, q.options.index(q.answer))


def _zero_shot(rng: np.random.Generator) -> Iterator[Case]:
    """A picture's caption, and those of pictures of which one object differs."""
    scene = lesson_scene(rng, "validation", CROWDED)
    others = [scene, *_changed(scene, rng)]
    texts = tuple(caption(other)[1] for other in others)
    yield _shuffled("caption", (draw(scene),), texts, rng)


def _changed(scene: Scene, rng: np.random.Generator) -> list[Scene]:
    """The scene with one object of another colour, of another shape, and of both."""
    place = int(rng.integers(len(scene.objects)))
    colour, shape = scene.objects[place].pair
    others = [
        pairs
        for other in COLOURS
        for form in SHAPES
        if other != colour
        and form != shape
        # A pair that training never shows would be wrong without a look.
        and set(pairs := ((other, shape), (colour, form), (other, form))) <= KNOWN
    ]
    return [_with(scene, place, pair) for pair in pick(rng, others)]


def _with(scene: Scene, place: int, pair: Pair) -> Scene:
    objects = list(scene.objects)
    objects[place] = replace(objects[place], colour=pair[0], shape=pair[1])
    return replace(scene, objects=tuple(objects))


def _few_shot(rng: np.random.Generator) -> Iterator[Case]:
    """A list's last name: what it is called is for the examples to tell."""
    scenes = [lesson_scene(rng, "validation", (1,)) for _ in range(LISTED)]
    pairs = [scene.objects[0].pair for scene in scenes]
    way = int(rng.integers(len(NAMES)))
    whole = listed(pairs, NAMES[way], range(LISTED))[:-1]
    parts = tuple(draw(scenes[x]) if isinstance(x, int) else x for x in whole)
    names = [name(pairs[-1]) for name in NAMES]
    wrong = _changed(scenes[-1], rng)[-1].objects[0].pair
    texts = [names[way], *(n for n in names if n != names[way])]
    texts += [name(wrong) for name in NAMES]
    yield _shuffled(f"list {way}", parts, [f" {text}\n" for text in texts], rng)


def _text(rng: np.random.Generator) -> Iterator[Case]:
    """A question that the text before it answers, and the last name of a list."""
    scene = lesson_scene(rng, "validation", TOLD)
    told = caption(scene, rng)[1]
    q = pick(rng, [q for q in questions(scene, rng) if q.kind != "where"])
    texts = tuple(f" {option}" for option in q.options)
    yield Case(q.kind, (f"{told}\n{q.text}",), texts, q.options.index(q.answer))
    pairs = some_pairs(rng)
    way = int(rng.integers(len(NAMES)))
    name = NAMES[way](pairs[-1])
    prompt = "".join(map(str, listed(pairs, NAMES[way])))[: -len(f" {name}\n")]
    names = [name, *(n(pairs[-1]) for n in NAMES if n(pairs[-1]) != name)]
    yield _shuffled(f"list {way}", (prompt,), [f" {n}\n" for n in names], rng)


def _shuffled(
    kind: str, parts: tuple[Part, ...], texts: Sequence[str], rng: np.random.Generator
) -> Case:
    """The case whose first text is the right one, now in any place."""
    order = rng.permutation(len(texts))
    right = int(np.flatnonzero(order == 0)[0])
    return Case(kind, parts, tuple(texts[i] for i in order), right)
