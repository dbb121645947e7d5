"""What a point reads: captions, documents of pictures and text, text alone, questions.

One to four objects in a picture. Half of the documents, and of the texts, are lists: in
each, objects are called by their colours, or by their shapes, or by both, and what stands
before tells which. So a few examples in a prompt are what such a document begins with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.shapes.documents import Part, interleaved, written
from benchmarks.shapes.questions import Question, article, caption, questions
from benchmarks.shapes.scene import SEEN_PAIRS, Pair, Scene, Split, pick, random_scene

COUNTS = (1, 2, 3, 4)
# Of a batch's pictures, those of one object: a list is of such, each another.
LONE = 8
# Pictures, or things, of a list, and pictures of another document.
LISTED, SHOWN = 5, 3

# How a list calls what it is of: colour and shape to a name.
NAMES: tuple[Callable[[Pair], str], ...] = (
    lambda pair: pair[0],
    lambda pair: pair[1],
    " ".join,
)


def lesson_scene(
    rng: np.random.Generator, split: Split = "train", counts: Sequence[int] = COUNTS
) -> Scene:
    """A picture's scene, 96 pixels of a short side, whatever a model makes of it."""
    return random_scene(rng, split, counts=counts)


def captioned(scenes: Sequence[Scene], place: int) -> list[Part]:
    """A picture and its caption."""
    return [place, caption(scenes[place])[1]]


def document(scenes: Sequence[Scene], rng: np.random.Generator) -> list[Part]:
    """Pictures between texts: a list, or sentences about each."""
    if rng.random() < 0.5:
        lone = [i for i, scene in enumerate(scenes) if len(scene.objects) == 1]
        places = [int(i) for i in rng.choice(lone, LISTED, replace=False)]
        pairs = [scenes[place].objects[0].pair for place in places]
        return listed(pairs, pick(rng, NAMES), places)
    places = [int(i) for i in rng.choice(len(scenes), SHOWN, replace=False)]
    return interleaved(scenes, places, rng)


def text(rng: np.random.Generator) -> list[Part]:
    """Words about what nobody sees: a list, or questions that the text answers."""
    if rng.random() < 0.5:
        pairs = some_pairs(rng)
        return ["".join(map(str, listed(pairs, pick(rng, NAMES))))]
    return [written(lesson_scene(rng), rng)]


def some_pairs(rng: np.random.Generator) -> list[Pair]:
    """The pairs of a list in words, as its pictures' would be."""
    return [pick(rng, SEEN_PAIRS) for _ in range(LISTED)]


def listed(
    pairs: Sequence[Pair],
    name: Callable[[Pair], str],
    places: Sequence[int] = (),
) -> list[Part]:
    """Pictures, or things in words, each with its name behind it."""
    parts: list[Part] = []
    for i, pair in enumerate(pairs):
        told = name(pair)
        if places:
            parts += [places[i], f" {told}\n"]
        else:
            parts.append(f"{article(' '.join(pair))}: {told}\n")
    return parts


def asked(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One question about a picture of each kind that it can answer, in any order."""
    found = questions(scene, rng)
    rng.shuffle(found)
    return found
