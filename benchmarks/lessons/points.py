"""What is trained: the points of every lesson, and what the paper says of them, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Connector = Literal["average_pool", "attention_pool", "c_abstractor"]
Form = Literal["captions", "interleaved", "texts", "questions"]
Measure = Literal["answers", "zero-shot", "few-shot", "text"]
SEEDS = (0, 1, 2)
# Pictures or texts of a measure.
NUMBER = 400

# Optimizer steps: of pre-training, of the shortest one that is fine-tuned, and of the
# fine-tuning on questions.
STEPS, SHORT = 300, 75
QUESTION_STEPS = 200
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
    # Shares of captions, interleaved documents and texts.
    mix: tuple[int, int, int] = FINAL_MIX
    pretrain_steps: int = STEPS
    # 0 for a model that is measured as pre-training leaves it.
    question_steps: int = 0


def _mixed(captions: int, documents: int, texts: int) -> Point:
    name = f"mix-{captions}-{documents}-{texts}"
    return Point(name, mix=(captions, documents, texts))


def _asked(times: int) -> Point:
    """A model that is asked questions behind so many times the shortest pre-training."""
    return Point(
        f"pretrain-x{times}",
        pretrain_steps=times * SHORT,
        question_steps=QUESTION_STEPS,
    )


BASE = Point("base")
SMALL, LARGE = Point("48px", image_size=48), Point("96px", image_size=96)
FEW, MANY = Point("4-tokens", image_tokens=4), Point("36-tokens", image_tokens=36)
AVERAGE = Point("average-pool", connector="average_pool")
ATTENTION = Point("attention-pool", connector="attention_pool")
CAPTIONS = _mixed(100, 0, 0)
HALVES = _mixed(50, 50, 0)
DOCUMENTS = _mixed(0, 100, 0)
BESIDE = _mixed(67, 0, 33)
THIRDS = _mixed(33, 33, 33)
ONCE, TWICE, FOURFOLD = _asked(1), _asked(2), _asked(4)
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
        ("zero-shot",),
        (
            Claim(
                "a higher resolution is better",
                "table 1, ViT-L, 224 to 336 px: 36.9 to 39.9 (0-shot), 58.7 to 62.4 "
                "(4-shot), 62.2 to 66.0 (8-shot)",
                measure="zero-shot",
                better=LARGE.name,
                worse=SMALL.name,
            ),
        ),
        (Curve("MM1, 0-shot, 224 and 336 px", (0, 2), (36.9, 39.9)),),
    ),
    Lesson(
        "tokens",
        "Image tokens",
        ((FEW, "4"), (BASE, "16"), (MANY, "36")),
        ("zero-shot",),
        (
            Claim(
                "more image tokens are better",
                "figure 4, 64 and 144 tokens; drawn only",
                measure="zero-shot",
                better=MANY.name,
                worse=FEW.name,
            ),
        ),
    ),
    Lesson(
        "connector",
        "Connector, 16 image tokens",
        ((AVERAGE, "average\npool"), (ATTENTION, "attention\npool"), (BASE, "C-abs.")),
        ("zero-shot",),
        (
            Claim(
                "the connector's type matters less than the number of tokens",
                "figure 4; drawn only",
                measure="zero-shot",
                better=MANY.name,
                worse=FEW.name,
                rivals=TYPES,
            ),
            Claim(
                "the connector's type matters less than the resolution",
                "figure 4; drawn only",
                measure="zero-shot",
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
                "section 3.2, none to half of them or more, remembered: 45 to over 61 "
                "(8-shot), 43.7 to 58 (4-shot)",
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
            Curve("MM1, 8-shot, remembered", (0, 1), (45.0, 61.0)),
        ),
    ),
    Lesson(
        "text",
        "Text alone",
        (
            (CAPTIONS, "captions"),
            (BESIDE, "captions,\n33%\ntext"),
            (HALVES, "both"),
            (BASE, "both,\n10%\ntext"),
            (THIRDS, "both,\n33%\ntext"),
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
        ((ONCE, "x1"), (TWICE, "x2"), (FOURFOLD, "x4")),
        ("answers",),
        (
            Claim(
                "longer pre-training is better after fine-tuning",
                "figure 7c; drawn only",
                measure="answers",
                better=FOURFOLD.name,
                worse=ONCE.name,
            ),
        ),
    ),
    Lesson(
        "experts",
        "Experts, as many weights at work",
        ((BASE, "dense"), (SPARSE, "8 experts")),
        ("zero-shot",),
        (
            Claim(
                "experts beat a dense decoder",
                "table 4, 3B: 10 of 12 benchmarks rose, as VQAv2 82.0 to 82.5 and TextVQA "
                "71.9 to 72.9; MME-P fell from 1482.5 to 1469.4, MM-Vet from 43.7 to 42.2",
                measure="zero-shot",
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


def measures_of(point: Point) -> tuple[Measure, ...]:
    """What a point is measured by: all that a lesson of its asks for."""
    found = {
        measure: None
        for lesson in LESSONS
        if any(held.name == point.name for held, _ in lesson.points)
        for measure in lesson.measures
    }
    return tuple(found)
