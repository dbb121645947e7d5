"""What a base model reads: captions, documents with pictures in them, and text alone.

The three kinds of MM1 (arXiv 2403.09611), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.shapes.compare import compare
from benchmarks.shapes.episodes import Episode
from benchmarks.shapes.questions import (
    article,
    ask_count,
    ask_exists,
    ask_place,
    ask_where,
    caption,
    questions,
)
from benchmarks.shapes.scene import UNNAMED, Scene, pick

ORDINALS = ("first", "second", "third", "fourth")
# A text, or a picture by its place among those at hand.
Part = str | int


def captions(scene: Scene, rng: np.random.Generator, count: int) -> list[str]:
    """Sentences that are true of a picture, its caption first."""
    texts = [f"It says {label.text}." for label in scene.labels]
    if scene.objects:
        told = [*questions(scene, rng), ask_where(scene, rng), ask_place(scene, rng)]
        told += [ask_count(scene, rng), ask_exists(scene, rng), ask_where(scene, rng)]
        texts.append(caption(scene, rng)[1])
        texts += [q.sentence for q in told if q is not None and q.sentence]
    texts = [text for text in dict.fromkeys(texts) if UNNAMED not in text.lower()]
    return texts[:count]


def interleaved(
    scenes: Sequence[Scene], places: Sequence[int], rng: np.random.Generator
) -> list[Part]:
    """Pictures with text about each behind it, and about the first two at the end."""
    parts: list[Part] = []
    for number, place in enumerate(places):
        lines = captions(scenes[place], rng, 6)
        if not lines:
            continue
        line = pick(rng, lines)
        start = f"The {ORDINALS[number]} picture: " if rng.random() < 0.4 else ""
        parts += [place, f"{start}{line}\n"]
    if len(places) >= 2:
        asked = list(compare((scenes[places[0]], scenes[places[1]]), rng))
        told = [q for q in asked if UNNAMED not in f"{q.text} {q.answer}".lower()]
        if told:
            question = pick(rng, told)
            parts.append(f"{question.text} {question.answer}")
    return parts


def naming(episode: Episode, places: Sequence[int]) -> list[Part]:
    """Pictures, each with what it is called behind it."""
    parts: list[Part] = []
    for place, word in zip(places, episode.words, strict=True):
        parts += [place, f"is called {word}\n"]
    return parts


def written(scene: Scene, rng: np.random.Generator) -> str:
    """A text about a scene that nobody sees: it says all that it then asks about."""
    told = caption(scene, rng)[1]
    asked = [q for q in questions(scene, rng) if q.kind in ("colour", "shape", "count")]
    asked += [ask_exists(scene, rng)]
    rng.shuffle(asked)  # type: ignore[arg-type]
    lines = [told, *(f"{q.text} {q.answer}" for q in asked[:3])]
    return "\n".join(lines)


def told_naming(episode: Episode) -> str:
    """A text that tells what is called how."""
    return "\n".join(
        f"{article(' '.join(pair))} is called {word}"
        for pair, word in zip(episode.pairs, episode.words, strict=True)
    )
