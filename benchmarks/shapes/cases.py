"""What the embedded model is asked: questions, the pictures before them, and the answers.

Every held-out picture shows a pair of colour and shape that no training picture did, or a
word, a number or a name that none did; what is asked is about it where it is about one.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
from PIL import Image

from benchmarks.shapes.boxes import ask_box
from benchmarks.shapes.compare import Two, compare
from benchmarks.shapes.draw import draw
from benchmarks.shapes.episodes import TEXTS, random_episode
from benchmarks.shapes.plain import COLOURS as PLAIN_COLOURS
from benchmarks.shapes.plain import SHAPES as PLAIN_SHAPES
from benchmarks.shapes.plain import plain_pictures
from benchmarks.shapes.questions import (
    NUMBER_WORDS,
    Question,
    ask_place,
    caption,
    plural,
    questions,
)
from benchmarks.shapes.reading import ask_reading
from benchmarks.shapes.scene import (
    ARROW,
    COLOURS,
    COUNTS,
    FEW,
    HELD_OUT,
    SHAPES,
    UNSEEN_PAIRS,
    Scene,
    Split,
    pick,
    random_scene,
    split_rng,
)
from benchmarks.shapes.writing import LARGE, SMALL, writing_scene
from mm1_mlx.eval.recall import THRESHOLD, overlap

# exact: after lower-casing; facts: what a caption states is true; box: found by its IoU.
Judge = Literal["exact", "facts", "box"]
# The resolution of an overview and four parts.
IN_PARTS = "2x96"
_BOX = re.compile(r"\[(\d+), (\d+), (\d+), (\d+)\]")
_NOUNS = {noun: shape for shape in (*SHAPES, ARROW) for noun in (shape, plural(shape))}
_FACT = re.compile(
    rf"\b(an?|{'|'.join(NUMBER_WORDS)}) ({'|'.join(COLOURS)}) ({'|'.join(_NOUNS)})\b"
)
ONE_FACT = [f"A {colour} {shape}." for colour in COLOURS for shape in SHAPES]
# Of which the best is what somebody would say who sees nothing.
BOXES = 200


@dataclass(frozen=True)
class Case:
    """A question about pictures.

    Attributes:
        kind: of which table row.
        pictures: what it is about.
        question: the text.
        expected: the answer; of a caption, one of the sentences that are right.
        options: the answers that the question leaves open, of which each is as likely
            to somebody who sees nothing; none where they cannot be listed.
        unseen: those that would make a pair which training never showed.
        judge: how an answer is compared.
        shots: solved examples of the same question, a picture and its answer each.
        before: what was asked and answered earlier, and the pictures it came with.
        mode: of resolution, None for the model's own.
    """

    kind: str
    pictures: tuple[Image.Image, ...]
    question: str
    expected: str
    options: tuple[str, ...] = ()
    unseen: frozenset[str] = frozenset()
    judge: Judge = "exact"
    shots: tuple[tuple[Image.Image, str], ...] = ()
    before: tuple[tuple[tuple[Image.Image, ...], str, str], ...] = ()
    mode: str | None = None

    @property
    def blind(self) -> tuple[tuple[str, ...], str]:
        """Its form, and the answer, as somebody tells them apart who sees nothing.

        Of words that are made up for this case alone that is which was told first.
        """
        if self.shots:
            told = list(dict.fromkeys(word for _, word in self.shots))
            return ("told first", "told later"), str(told.index(self.expected))
        return self.options, normalise(self.expected)

    def is_right(self, answer: str) -> bool:
        """Whether an answer is right."""
        return agrees(self.judge, answer, self.expected)


def agrees(judge: Judge, answer: str, expected: str) -> bool:
    """Whether an answer is right where another one is."""
    if judge == "facts":
        return states_only_facts(answer, expected)
    if judge == "box":
        found, wanted = boxes(answer), boxes(expected)
        return bool(found) and overlap(found[0], wanted[0]) > THRESHOLD
    return normalise(answer) == normalise(expected)


def likeliest(judge: Judge, expected: Counter[str]) -> int:
    """How many of these the one answer is right about that is right most often.

    Of boxes it is looked for among the first of them, of captions among those that state
    one thing: what states more is right where less is, and not always there.
    """
    if judge == "exact":
        return max(expected.values())
    guesses = ONE_FACT if judge == "facts" else islice(expected, BOXES)
    return max(
        sum(n for right, n in expected.items() if agrees(judge, guess, right))
        for guess in guesses
    )


def normalise(answer: str) -> str:
    """Lower case, without surrounding space."""
    return answer.strip().lower()


def boxes(text: str) -> list[tuple[float, ...]]:
    """The boxes that a text holds."""
    return [tuple(map(float, match)) for match in _BOX.findall(text)]


def facts(text: str) -> Counter[tuple[str, str]]:
    """How many of each pair a caption states."""
    found: Counter[tuple[str, str]] = Counter()
    for number, colour, noun in _FACT.findall(text.lower()):
        found[colour, _NOUNS[noun]] += _number(number)
    return found


def _number(word: str) -> int:
    return 1 if word in ("a", "an") else NUMBER_WORDS.index(word) + 2


def states_only_facts(answer: str, expected: str) -> bool:
    """Whether a caption states something, nothing false, and nothing that is unreadable."""
    stated, true = facts(answer), facts(expected)
    rest = _FACT.sub("", normalise(answer))
    understood = not re.sub(r"\band\b|[,.\s]", "", rest)
    return bool(stated) and understood and stated <= true


# Cases of seeds below this were measured while the recipe was made, or candidates compared
# on them.
FIRST_SEED = 300_000_000


def _case_rng(split: Split, seed: int) -> np.random.Generator:
    return split_rng(split, FIRST_SEED + seed)


# The parts of an evaluation: so many cases of each kind, drawn seed after seed.
SCENE_KINDS = (
    *("colour", "shape", "count", "count to 4", "exists", "where", "caption"),
    *("caption, whole and in order", "place", "box"),
)
STYLE_KINDS = ("in a word", "in a sentence")
TALK_KINDS = ("follow-up", "after other pictures")


def _of_each(
    number: int, kinds: Sequence[str], cases: Iterator[Case]
) -> Iterator[Case]:
    """The first cases of each kind, of an endless row of them."""
    lacking = dict.fromkeys(kinds, number)
    while any(lacking.values()):
        case = next(cases)
        if lacking[case.kind]:
            lacking[case.kind] -= 1
            yield case


def scene_cases(
    number: int, split: Split = "held_out", counts: Sequence[int] = COUNTS
) -> Iterator[Case]:
    """So many questions of each kind, captions, halves and boxes; a few a picture."""
    return _of_each(number, SCENE_KINDS, _scene_cases(split, counts))


def _scene_cases(split: Split, counts: Sequence[int]) -> Iterator[Case]:
    for seed in itertools.count():
        rng = _case_rng(split, seed)
        scene = random_scene(rng, split, counts=counts)
        shown = (draw(scene),)
        for q in questions(scene, rng):
            yield Case(q.kind, shown, q.text, q.answer, q.options, unseen_answers(q))
            if q.kind == "count" and int(q.answer) <= 4:
                yield Case("count to 4", shown, q.text, q.answer, q.options)
        instruction, sentence = caption(scene, rng)
        yield Case("caption", shown, instruction, sentence, judge="facts")
        yield Case("caption, whole and in order", shown, instruction, sentence)
        # Last, so that they change nothing of what the others ask.
        if half := ask_place(scene, rng):
            yield Case("place", shown, half.text, half.answer, half.options)
        if box := ask_box(scene, rng):
            yield Case("box", shown, box.text, box.answer, judge="box")


def unseen_answers(question: Question) -> frozenset[str]:
    """The colours or shapes that training never showed on what is asked about."""
    if question.target is None or question.kind not in ("colour", "shape"):
        return frozenset()
    colour, shape = question.target.pair
    if question.kind == "colour":
        return frozenset(c for c, s in UNSEEN_PAIRS if s == shape)
    return frozenset(s for c, s in UNSEEN_PAIRS if c == colour)


def style_cases(number: int, split: Split = "held_out") -> Iterator[Case]:
    """So many questions with a wish for a word, and for a sentence."""
    return _of_each(number, STYLE_KINDS, _style_cases(split))


def _style_cases(split: Split) -> Iterator[Case]:
    for seed in itertools.count():
        rng = _case_rng(split, 1_000_000 + seed)
        lone = seed % 2 == 0
        scene = random_scene(rng, split, counts=(1,) if lone else COUNTS)
        shown = (draw(scene),)
        if lone:
            # Without the wish, the answer is a sentence.
            text = f"{caption(scene, rng)[0]} Answer with a single word."
            yield Case("in a word", shown, text, scene.objects[0].shape, SHAPES)
            continue
        asked = [q for q in questions(scene, rng) if q.sentence]
        if asked:
            q = pick(rng, asked)
            text = f"{q.text} Answer in a sentence."
            yield Case("in a sentence", shown, text, q.sentence, q.options)


def talk_cases(number: int, split: Split = "held_out") -> Iterator[Case]:
    """So many questions behind others about the same picture, and about other pictures."""
    return _of_each(number, TALK_KINDS, _talk_cases(split))


def _talk_cases(split: Split) -> Iterator[Case]:
    for seed in itertools.count():
        rng = _case_rng(split, 6_000_000 + seed)
        scenes = [random_scene(rng, split) for _ in range(3)]
        shown = [(draw(scene),) for scene in scenes]
        *others, asked = [questions(scene, rng) for scene in scenes]
        rng.shuffle(asked)  # type: ignore[arg-type]
        last, *earlier = asked[:4]
        known = (last.text, last.answer, last.options, unseen_answers(last))
        if earlier:
            # The picture came with the first of them.
            pictures = (shown[-1], *[()] * (len(earlier) - 1))
            told = [
                (p, q.text, q.answer) for p, q in zip(pictures, earlier, strict=True)
            ]
            yield Case("follow-up", (), *known, before=tuple(told))
        firsts = [pick(rng, some) for some in others]
        told = [(p, q.text, q.answer) for p, q in zip(shown[:-1], firsts, strict=True)]
        yield Case("after other pictures", shown[-1], *known, before=tuple(told))


def pair_cases(number: int, split: Split = "held_out") -> Iterator[Case]:
    """A question about two pictures, of each form as often as can be."""
    asked: Counter[str] = Counter()
    for seed in range(number):
        rng = _case_rng(split, 2_000_000 + seed)
        scenes: Two = (
            random_scene(rng, split, counts=FEW),
            random_scene(rng, split, counts=FEW),
        )
        found = list(compare(scenes, rng))
        rng.shuffle(found)  # type: ignore[arg-type]
        q = min(found, key=lambda q: asked[" ".join(q.options)])
        asked[" ".join(q.options)] += 1
        shown = (draw(scenes[0]), draw(scenes[1]))
        yield Case("two pictures", shown, q.text, q.answer, q.options)


def reading_cases(number: int, split: Split = "held_out") -> Iterator[Case]:
    """A word or number that can be read at a glance."""
    for seed in range(number):
        rng = _case_rng(split, 3_000_000 + seed)
        scene = writing_scene(rng, split, heights=LARGE)
        q = ask_reading(scene, rng)
        yield Case("read", (draw(scene),), q.text, q.answer)


def small_cases(number: int, split: Split = "held_out") -> Iterator[Case]:
    """A small word or number, as one picture and with parts of it."""
    for seed in range(number):
        rng = _case_rng(split, 4_000_000 + seed)
        scene = writing_scene(rng, split, 192, SMALL)
        q = ask_reading(scene, rng)
        shown = (draw(scene),)
        yield Case("read small, one picture", shown, q.text, q.answer)
        yield Case("read small, with parts", shown, q.text, q.answer, mode=IN_PARTS)


def word_cases(number: int, shots: int, split: Split = "held_out") -> Iterator[Case]:
    """A new word, of two that as many examples tell apart.

    Held-out cases ask about a held-out pair, behind examples of any.
    """
    kind = f"new word, {shots} shots"
    for seed in range(number):
        rng = _case_rng(split, 5_000_000 + 10 * seed + shots)
        yield _word_case(kind, shots, split, rng, strict=False)


def strict_word_cases(number: int, shots: int) -> Iterator[Case]:
    """A new word whose examples are held-out pairs as well as what is asked about.

    Two shapes alone have two such pairs each, blue and pink triangles, orange and black
    hearts, so that it is always these two which are told apart.
    """
    kind = f"new word, {shots} shots, all held out"
    for seed in range(number):
        rng = _case_rng("held_out", 5_000_000 + 10 * seed + shots)
        yield _word_case(kind, shots, "held_out", rng, strict=True)


def _word_case(
    kind: str, shots: int, split: Split, rng: np.random.Generator, *, strict: bool
) -> Case:
    new = split == "held_out"
    # A held-out scene of one object shows a held-out pair, one of validation never does.
    splits: tuple[Split, ...] = (
        ("held_out", "validation") if new and not strict else (split,)
    )
    episode = None
    while episode is None or (new and episode.pairs[-1] not in HELD_OUT):
        scenes = [
            random_scene(rng, splits[k % len(splits)], counts=(1,)) for k in range(48)
        ]
        pairs = [scene.objects[0].pair for scene in scenes]
        episode = random_episode(rng, pairs, shots, held_out=new)
    shown = [_picture_of(pair, scenes, rng) for pair in episode.pairs]
    answers = tuple(sorted(set(episode.words)))
    examples = tuple(zip(shown[:-1], episode.words[:-1], strict=True))
    text, expected = pick(rng, TEXTS), episode.words[-1]
    return Case(kind, (shown[-1],), text, expected, answers, shots=examples)


def _picture_of(
    pair: tuple[str, str], scenes: Sequence[Scene], rng: np.random.Generator
) -> Image.Image:
    return draw(pick(rng, [s for s in scenes if s.objects[0].pair == pair]))


def plain_cases() -> Iterator[Case]:
    """The colour and the shape of every plainly drawn picture."""
    for picture, colour, shape in plain_pictures():
        question = f"What colour is the {shape}?"
        yield Case("plain colour", (picture,), question, colour, PLAIN_COLOURS)
        question = "What shape is this?"
        yield Case("plain shape", (picture,), question, shape, PLAIN_SHAPES)


def _all_word_cases(number: int, split: Split) -> Iterator[Case]:
    for shots in (4, 8):
        yield from word_cases(number, shots, split)
        if split == "held_out":
            yield from strict_word_cases(number, shots)


PARTS = ("scenes", "style", "talks", "pairs", "reading", "small", "words", "plain")


def part_cases(part: str, number: int, split: Split = "held_out") -> Iterable[Case]:
    """The cases of one part, so many of each kind; plain pictures are as many as are."""
    if part == "words":
        return _all_word_cases(number, split)
    if part == "plain":
        return plain_cases()
    makers = {
        "scenes": scene_cases,
        "style": style_cases,
        "talks": talk_cases,
        "pairs": pair_cases,
        "reading": reading_cases,
        "small": small_cases,
    }
    return makers[part](number, split)
