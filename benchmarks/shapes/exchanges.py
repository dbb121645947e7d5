"""Questions with their answers, as people type them and as they want them answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from benchmarks.shapes.balance import is_evidence
from benchmarks.shapes.boxes import ask_box
from benchmarks.shapes.questions import (
    LONE_CAPTION_TEXTS,
    Kind,
    Question,
    ask_place,
    caption,
    questions,
)
from benchmarks.shapes.reading import ask_reading
from benchmarks.shapes.scene import COLOURS, UNNAMED, Pair, Scene, pick

# Share of the questions in lower case.
LOWER_CASE = 0.15
# Of the questions that ask for a word or for a sentence; the others say nothing of it,
# and are answered in a word.
ASKED_WORD, ASKED_SENTENCE = 0.12, 0.15
WORD_SUFFIXES = (
    "Answer with a single word.",
    "Answer the question using a single word or phrase.",
    "One word, please.",
)
SENTENCE_SUFFIXES = ("Answer in a sentence.", "Answer in a full sentence.")
NO_SHARES: Mapping[str, float] = MappingProxyType({})
# How often each kind is asked about a picture, if that makes other questions.
ROUNDS = 2
# What may be asked about things that are told in words, without their places.
TOLD_KINDS = ("colour", "shape", "count", "exists")


@dataclass(frozen=True)
class Exchange:
    """A question and its answer."""

    question: str
    answer: str
    # The pair that the answer is half of, where it is one.
    about: Pair | None = None
    # What is asked for, where doubts depend on it.
    kind: Kind | None = None


def read_labels(
    scenes: Sequence[Scene], rng: np.random.Generator
) -> list[list[Exchange]]:
    """What every label of each scene says."""
    return [
        [exchange_of(ask_reading(scene, rng, label), rng) for label in scene.labels]
        for scene in scenes
    ]


def ask(
    scene: Scene,
    rng: np.random.Generator,
    count: int,
    *,
    fair: bool = False,
    shares: Mapping[str, float] = NO_SHARES,
) -> list[Exchange]:
    """At most ``count`` different exchanges, by chance of the questions and a caption.

    Args:
        scene: that they are about.
        rng: decides.
        count: how many there are at most.
        fair: whether all tell nothing of pairs that are not shown.
        shares: of the questions of a kind that stay, all where nothing is said.
    """
    named = sum(o.colour != UNNAMED for o in scene.objects) / len(scene.objects)
    asked: list[Exchange] = []
    # As many fall away.
    for _ in range(ROUNDS + fair):
        found = [*questions(scene, rng), ask_place(scene, rng), ask_box(scene, rng)]
        for q in found:
            if q is None or not (rng.random() < named or not _denies(q)):
                continue
            if q.kind in shares and rng.random() >= shares[q.kind]:
                continue
            if not (fair and is_evidence(q.text, [scene])):
                asked.append(exchange_of(q, rng))
    asked.append(described(scene, rng))
    asked = sayable(asked)
    rng.shuffle(asked)  # type: ignore[arg-type]
    return asked[:count]


def ask_told(scene: Scene, rng: np.random.Generator, count: int) -> list[Exchange]:
    """At most ``count`` exchanges about a scene that the first of them tells in words."""
    found = [q for _ in range(ROUNDS) for q in questions(scene, rng)]
    asked = sayable([exchange_of(q, rng) for q in found if q.kind in TOLD_KINDS])
    rng.shuffle(asked)  # type: ignore[arg-type]
    first, *others = asked[:count]
    told = caption(scene, rng)[1]
    return [replace(first, question=f"{told} {first.question}"), *others]


def described(scene: Scene, rng: np.random.Generator) -> Exchange:
    """A caption; of one object now and then its shape alone, where a word is asked for."""
    question, answer = caption(scene, rng)
    if len(scene.objects) == 1 and rng.random() < 0.4:
        item = scene.objects[0]
        text = f"{pick(rng, LONE_CAPTION_TEXTS)} {pick(rng, WORD_SUFFIXES)}"
        return Exchange(text, item.shape, item.pair)
    return Exchange(question, answer)


def exchange_of(q: Question, rng: np.random.Generator) -> Exchange:
    """The question, at times with how it is to be answered."""
    about = q.target.pair if q.target and q.kind in ("colour", "shape") else None
    if q.kind == "box":
        return Exchange(q.text, q.answer)
    style = rng.random()
    if style < ASKED_WORD:
        return Exchange(f"{q.text} {pick(rng, WORD_SUFFIXES)}", q.answer, about, q.kind)
    if style < ASKED_WORD + ASKED_SENTENCE and q.sentence:
        text = f"{q.text} {pick(rng, SENTENCE_SUFFIXES)}"
        return Exchange(text, q.sentence, kind=q.kind)
    return Exchange(q.text, q.answer, about, q.kind)


def _denies(question: Question) -> bool:
    """Whether the answer is that some colour is not there.

    Where objects have no name, its counterpart cannot be said as often.
    """
    denied = question.kind in ("exists", "count") and question.answer in ("no", "0")
    return denied and any(colour in question.text for colour in COLOURS)


def sayable(exchanges: Sequence[Exchange]) -> list[Exchange]:
    """What can be said without a name for what has none, every question once."""
    return [
        exchange
        for exchange in {e.question: e for e in exchanges}.values()
        if UNNAMED not in f"{exchange.question} {exchange.answer}".lower()
    ]


def vary(exchange: Exchange, rng: np.random.Generator) -> Exchange:
    """The exchange as people also type it."""
    if rng.random() >= LOWER_CASE:
        return exchange
    return replace(exchange, question=exchange.question.lower())
