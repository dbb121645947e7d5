"""Questions that need two pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.shapes.questions import (
    YES_NO,
    Question,
    article,
    plural,
    unique,
)
from benchmarks.shapes.scene import (
    COLOURS,
    HELD_OUT,
    SEEN_PAIRS,
    SHAPES,
    UNSEEN_PAIRS,
    Object,
    Pair,
    Scene,
    pick,
)

ORDER = ("first", "second")
WHICH = (*ORDER, "both", "neither")

MORE_TEXTS = (
    "Which picture has more {things}, the first or the second?",
    "Which picture shows more {things}?",
    "Are there more {things} in the first or in the second picture?",
)
WHICH_TEXTS = (
    "Which picture shows {thing}: first, second, both or neither?",
    "In which picture is there {thing}: first, second, both or neither?",
)
BOTH_TEXTS = ("Do both pictures show {thing}?", "Is there {thing} in both pictures?")
SAME_COLOUR_TEXTS = (
    "Is the {shape} in the first picture the same colour as in the second?",
    "Do the two {shapes} have the same colour?",
)
SAME_SHAPE_TEXTS = (
    "Is the {colour} object the same shape in both pictures?",
    "Do the two {colour} objects have the same shape?",
)
COLOUR_TEXTS = (
    "What colour is the {shape} in the {order} picture?",
    "In the {order} picture, what colour is the {shape}?",
)
SHAPE_TEXTS = (
    "What shape is the {colour} object in the {order} picture?",
    "In the {order} picture, which shape is {colour}?",
)

Two = tuple[Scene, Scene]


def compare(scenes: Two, rng: np.random.Generator) -> list[Question]:
    """One question of every form that the two scenes can answer."""
    makers = (ask_more, ask_which, ask_both, ask_same, ask_in_one)
    asked = (maker(scenes, rng) for maker in makers)
    return [question for question in asked if question is not None]


def ask_more(scenes: Two, rng: np.random.Generator) -> Question | None:
    """Which of the two has more of something."""
    counts = [_counts(scene) for scene in scenes]
    things = sorted({*counts[0], *counts[1]})
    unequal = [thing for thing in things if counts[0][thing] != counts[1][thing]]
    if not unequal:
        return None
    wanted = pick(rng, (0, 1))
    fitting = [t for t in unequal if (counts[1][t] > counts[0][t]) == wanted]
    thing = pick(rng, fitting or unequal)
    answer = ORDER[counts[1][thing] > counts[0][thing]]
    text = pick(rng, MORE_TEXTS).format(things=thing)
    sentence = f"The {answer} picture has more {thing}."
    return Question("compare", text, answer, ORDER, None, sentence)


def ask_which(scenes: Two, rng: np.random.Generator) -> Question | None:
    """Which of the two shows something, each of the four answers as likely."""
    thing, answer = _thing(scenes, rng, pick(rng, WHICH))
    text = pick(rng, WHICH_TEXTS).format(thing=thing)
    return Question("compare", text, answer, WHICH)


def ask_both(scenes: Two, rng: np.random.Generator) -> Question | None:
    """Whether both show something; yes and no are as likely."""
    wanted = "both" if rng.random() < 0.5 else pick(rng, ORDER)
    thing, found = _thing(scenes, rng, wanted)
    answer = "yes" if found == "both" else "no"
    return Question(
        "compare", pick(rng, BOTH_TEXTS).format(thing=thing), answer, YES_NO
    )


def ask_same(scenes: Two, rng: np.random.Generator) -> Question | None:
    """Whether what has one shape has one colour, or the other way round."""
    by_shape = _shared(scenes, lambda o: o.shape, lambda o: o.colour)
    by_colour = _shared(scenes, lambda o: o.colour, lambda o: o.shape)
    wanted = rng.random() < 0.5
    for found, texts in (
        ((by_shape, SAME_COLOUR_TEXTS), (by_colour, SAME_SHAPE_TEXTS))
        if rng.random() < 0.5
        else ((by_colour, SAME_SHAPE_TEXTS), (by_shape, SAME_COLOUR_TEXTS))
    ):
        fitting = [key for key, same in found if same == wanted]
        if fitting:
            key = pick(rng, fitting)
            shapes = plural(key) if key in SHAPES else ""
            text = pick(rng, texts).format(shape=key, shapes=shapes, colour=key)
            return Question("compare", text, YES_NO[not wanted], YES_NO)
    return None


def ask_in_one(scenes: Two, rng: np.random.Generator) -> Question | None:
    """The colour or shape of an object in one of the two."""
    side = pick(rng, (0, 1))
    scene, order = scenes[side], ORDER[side]
    if rng.random() < 0.5:
        targets = unique(scene, lambda o: o.shape)
        if not targets:
            return None
        target = pick(rng, targets)
        text = pick(rng, COLOUR_TEXTS).format(shape=target.shape, order=order)
        return Question("compare", text, target.colour, tuple(COLOURS), target)
    targets = unique(scene, lambda o: o.colour)
    if not targets:
        return None
    target = pick(rng, targets)
    text = pick(rng, SHAPE_TEXTS).format(colour=target.colour, order=order)
    return Question("compare", text, target.shape, SHAPES, target)


def _counts(scene: Scene) -> Counter[str]:
    counts = Counter({"shapes": len(scene.objects)})
    for item in scene.objects:
        counts[plural(item.shape)] += 1
        counts[f"{item.colour} shapes"] += 1
    return counts


def _thing(scenes: Two, rng: np.random.Generator, wanted: str) -> tuple[str, str]:
    """Something, as a noun with its article, and where it is; as wanted if that can be."""
    # Of the pairs that are asked about, all are held out where one of the two scenes'
    # is: the words tell nothing.
    present = {item.pair for scene in scenes for item in scene.objects}
    pool = SEEN_PAIRS if present.isdisjoint(HELD_OUT) else UNSEEN_PAIRS
    things = [
        [(article(" ".join(pair)), _is_pair(pair)) for pair in pool],
        [(article(shape), _is_shape(shape)) for shape in SHAPES],
    ]
    # A pair, or a shape; the other where only that is as wanted.
    rng.shuffle(things)  # type: ignore[arg-type]
    where = [{name: _where(scenes, fits) for name, fits in some} for some in things]
    for places in where:
        fitting = [name for name, place in places.items() if place == wanted]
        if fitting:
            return pick(rng, fitting), wanted
    name = pick(rng, list(where[0]))
    return name, where[0][name]


def _is_pair(pair: Pair) -> Callable[[Object], bool]:
    return lambda item: item.pair == pair


def _is_shape(shape: str) -> Callable[[Object], bool]:
    return lambda item: item.shape == shape


def _where(scenes: Two, fits: Callable[[Object], bool]) -> str:
    first, second = (any(fits(item) for item in scene.objects) for scene in scenes)
    if first:
        return "both" if second else "first"
    return "second" if second else "neither"


def _shared(
    scenes: Two, key: Callable[[Object], str], other: Callable[[Object], str]
) -> Sequence[tuple[str, bool]]:
    """What one object alone has in each of the two, and whether its other is the same."""
    held = [{key(item): other(item) for item in unique(scene, key)} for scene in scenes]
    return [(k, held[0][k] == held[1][k]) for k in sorted(held[0].keys() & held[1])]
