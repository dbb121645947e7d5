"""What is trained: the points of every lesson, and what the paper says of them, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Connector = Literal["average_pool", "attention_pool", "c_abstractor"]
Form = Literal["captions", "interleaved", "texts", "questions"]
# A model that was asked to answer is measured by answers; else by what it goes on with.
Measure = Literal["answers", "zero-shot", "few-shot", "text"]
SEEDS = (0, 1, 2)
# Pictures or texts of a measure.
NUMBER = 200

# Optimizer steps: of the shortest pre-training, of one that is itself measured, and of
# the fine-tuning on questions.
SHORT, LONG = 75, 400
QUESTION_STEPS = 400
# Captions, documents with pictures and texts, as the paper's final model has them.
FINAL_MIX = (45, 45, 10)


@dataclass(frozen=True)
class Point:
    """A model and what it learns from; the defaults are where the lessons meet."""

    name: str
    # Pixels of a side, of which a patch has 8.
    image_size: int = 72
    image_tokens: int = 16
    connector: Connector = "c_abstractor"
    # Experts of every other layer, of which a token takes two; 0 for none.
    experts: int = 0
    pretrain_steps: int = SHORT
    # Shares of captions, interleaved documents and texts.
    mix: tuple[int, int, int] = FINAL_MIX
    question_steps: int = QUESTION_STEPS


def _pretrained(mix: tuple[int, int, int]) -> Point:
    """A model that is measured as pre-training leaves it."""
    name = "mix-" + "-".join(map(str, mix))
    return Point(name, mix=mix, pretrain_steps=LONG, question_steps=0)


BASE = Point("base")
SMALL, LARGE = Point("48px", image_size=48), Point("96px", image_size=96)
FEW, MANY = Point("4-tokens", image_tokens=4), Point("36-tokens", image_tokens=36)
AVERAGE = Point("average-pool", connector="average_pool")
ATTENTION = Point("attention-pool", connector="attention_pool")
CAPTIONS = _pretrained((100, 0, 0))
HALVES = _pretrained((50, 50, 0))
DOCUMENTS = _pretrained((0, 100, 0))
BESIDE = _pretrained((67, 0, 33))
FINAL = _pretrained(FINAL_MIX)
THIRDS = _pretrained((33, 33, 33))
TWICE = Point("pretrain-x2", pretrain_steps=2 * SHORT)
FOURFOLD = Point("pretrain-x4", pretrain_steps=4 * SHORT)
SPARSE = Point("8-experts", experts=8)


@dataclass(frozen=True)
class Claim:
    """What the paper says: one point is better than another.

    Attributes:
        text: the paper's words, in ours.
        paper: its figures, where its text or tables have them.
        measure: by what.
        better: the name of the point that should be.
        worse: and of the other.
        rivals: points that should differ less, the best of them from the worst.
    """

    text: str
    paper: str
    measure: Measure
    better: str
    worse: str
    rivals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curve:
    """What the paper measured, at positions of a lesson's points."""

    label: str
    places: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Lesson:
    """A row of points along which one thing changes."""

    name: str
    title: str
    # In order, with what each is called on the axis.
    points: tuple[tuple[Point, str], ...]
    measures: tuple[Measure, ...]
    claims: tuple[Claim, ...]
    curves: tuple[Curve, ...] = field(default=())


TYPES = (AVERAGE.name, ATTENTION.name, BASE.name)
LESSONS = (
    Lesson(
        "resolution",
        "Resolution, pixels of a side",
        ((SMALL, "48"), (BASE, "72"), (LARGE, "96")),
        ("answers",),
        (
            Claim(
                "a higher resolution is better",
                "table 1, ViT-L, 224 to 336 px: 36.9 to 39.9 (0-shot), 58.7 to 62.4 "
                "(4-shot), 62.2 to 66.0 (8-shot)",
                measure="answers",
                better=LARGE.name,
                worse=SMALL.name,
            ),
        ),
        (Curve("MM1, 8-shot, 224 and 336 px", (0, 2), (62.2, 66.0)),),
    ),
    Lesson(
        "tokens",
        "Image tokens",
        ((FEW, "4"), (BASE, "16"), (MANY, "36")),
        ("answers",),
        (
            Claim(
                "more image tokens are better",
                "figure 4, 64 and 144 tokens; drawn only",
                measure="answers",
                better=MANY.name,
                worse=FEW.name,
            ),
        ),
    ),
    Lesson(
        "connector",
        "Connector, 16 image tokens",
        ((AVERAGE, "average\npool"), (ATTENTION, "attention\npool"), (BASE, "C-abs.")),
        ("answers",),
        (
            Claim(
                "the connector's type matters less than the number of tokens",
                "figure 4; drawn only",
                measure="answers",
                better=MANY.name,
                worse=FEW.name,
                rivals=TYPES,
            ),
            Claim(
                "the connector's type matters less than the resolution",
                "figure 4; drawn only",
                measure="answers",
                better=LARGE.name,
                worse=SMALL.name,
                rivals=TYPES,
            ),
        ),
    ),
    Lesson(
        "mix",
        "Captions / interleaved documents, %",
        ((CAPTIONS, "100/0"), (HALVES, "50/50"), (DOCUMENTS, "0/100")),
        ("zero-shot", "few-shot", "text"),
        (
            Claim(
                "captions lift zero-shot answers",
                "section 3.2, none to only captions: 25.8 to 39.3",
                measure="zero-shot",
                better=CAPTIONS.name,
                worse=DOCUMENTS.name,
            ),
            Claim(
                "interleaved documents lift few-shot answers",
                "section 3.2, none to half of them or more: 45 to over 61 (8-shot), "
                "43.7 to 58 (4-shot)",
                measure="few-shot",
                better=HALVES.name,
                worse=CAPTIONS.name,
            ),
            Claim(
                "interleaved documents lift text alone",
                "figure 5a; drawn only",
                measure="text",
                better=DOCUMENTS.name,
                worse=CAPTIONS.name,
            ),
        ),
        (
            Curve("MM1, 0-shot", (0, 2), (39.3, 25.8)),
            Curve("MM1, 8-shot", (0, 1), (45.0, 61.0)),
        ),
    ),
    Lesson(
        "text",
        "Text alone",
        (
            (CAPTIONS, "captions"),
            (BESIDE, "and 33 %\ntext"),
            (HALVES, "both"),
            (FINAL, "and 10 %\ntext"),
            (THIRDS, "and 33 %\ntext"),
        ),
        ("zero-shot", "few-shot", "text"),
        (
            Claim(
                "text beside captions lifts few-shot answers",
                "figure 5b; drawn only",
                measure="few-shot",
                better=BESIDE.name,
                worse=CAPTIONS.name,
            ),
            Claim(
                "text lifts text alone, beside captions and documents too",
                "figure 5b; drawn only",
                measure="text",
                better=THIRDS.name,
                worse=HALVES.name,
            ),
        ),
    ),
    Lesson(
        "length",
        "Pre-training, then the same questions",
        ((BASE, "x1"), (TWICE, "x2"), (FOURFOLD, "x4")),
        ("answers",),
        (
            Claim(
                "longer pre-training is better after fine-tuning",
                "figure 7c; drawn only",
                measure="answers",
                better=FOURFOLD.name,
                worse=BASE.name,
            ),
        ),
    ),
    Lesson(
        "experts",
        "Experts, as many weights at work",
        ((BASE, "dense"), (SPARSE, "8 experts")),
        ("answers",),
        (
            Claim(
                "experts beat a dense decoder",
                "table 4, 3B: 10 of 12 benchmarks rose, as VQAv2 82.0 to 82.5 and TextVQA "
                "71.9 to 72.9; MME-P fell from 1482.5 to 1469.4, MM-Vet from 43.7 to 42.2",
                measure="answers",
                better=SPARSE.name,
                worse=BASE.name,
            ),
        ),
        (Curve("MM1-3B, TextVQA", (0, 1), (71.9, 72.9)),),
    ),
)


def points_of(lessons: tuple[Lesson, ...] = LESSONS) -> dict[str, Point]:
    """Every point once, by its name."""
    return {point.name: point for lesson in lessons for point, _ in lesson.points}
