"""Held-out accuracy: ``python -m benchmarks.shapes.evaluate --model PATH``.

Greedy answers, exact match after lower-casing. Every held-out picture shows at least one
pair of colour and shape that no training picture did, and what is asked is about it where
the question is about one object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.shapes.draw import draw
from benchmarks.shapes.plain import COLOURS as PLAIN_COLOURS
from benchmarks.shapes.plain import SHAPES as PLAIN_SHAPES
from benchmarks.shapes.plain import plain_pictures
from benchmarks.shapes.questions import KINDS, Question, ask_place, caption, questions
from benchmarks.shapes.scene import UNSEEN_PAIRS, Split, random_scene, split_rng
from mm1_mlx.quantize.shapes import wilson

# A picture and a question in, an answer out.
Answerer = Callable[[Image.Image, str], str]


@dataclass(frozen=True)
class Case:
    """A question about a picture."""

    kind: str
    picture: Image.Image
    question: str
    expected: str
    # The answers that the question leaves open.
    options: tuple[str, ...] = ()
    # Those that would make a pair which training never showed.
    unseen: frozenset[str] = frozenset()


@dataclass
class Tally:
    """Right and wrong answers of one kind, and what guessing would have given."""

    right: int = 0
    total: int = 0
    # Sum over questions of 1 / options.
    uniform: float = 0.0
    answers: Counter[str] = field(default_factory=Counter)
    unseen: int = 0

    def add(self, case: Case, answer: str) -> None:
        """Count one question."""
        expected, answer = normalise(case.expected), normalise(answer)
        self.right += answer == expected
        self.total += 1
        self.uniform += 1 / len(case.options) if case.options else 0
        self.answers[expected] += 1
        self.unseen += answer in case.unseen

    def row(self) -> dict[str, Any]:
        """The figures, as JSON values."""
        low, high = wilson(self.right, self.total)
        return {
            "n": self.total,
            "accuracy": round(self.right / self.total, 4),
            "interval_95": [round(low, 4), round(high, 4)],
            "chance_uniform": round(self.uniform / self.total, 4),
            "chance_majority": round(max(self.answers.values()) / self.total, 4),
            "answered_unseen_pair": round(self.unseen / self.total, 4),
        }


def normalise(answer: str) -> str:
    """Lower case, without surrounding space."""
    return answer.strip().lower()


def scene_cases(num_pictures: int, split: Split = "held_out") -> Iterable[Case]:
    """One question of each kind, a caption and a half, about each of the pictures."""
    for seed in range(num_pictures):
        rng = split_rng(split, seed)
        scene = random_scene(rng, split)
        picture = draw(scene)
        for q in questions(scene, rng):
            yield Case(q.kind, picture, q.text, q.answer, q.options, unseen_answers(q))
        instruction, sentence = caption(scene, rng)
        yield Case("caption", picture, instruction, sentence)
        # Last, so that it changes nothing of what the others ask.
        if half := ask_place(scene, rng):
            yield Case("place", picture, half.text, half.answer, half.options)


def unseen_answers(question: Question) -> frozenset[str]:
    """The colours or shapes that training never showed on what is asked about."""
    if question.target is None or question.kind not in ("colour", "shape"):
        return frozenset()
    colour, shape = question.target.pair
    if question.kind == "colour":
        return frozenset(c for c, s in UNSEEN_PAIRS if s == shape)
    return frozenset(s for c, s in UNSEEN_PAIRS if c == colour)


def plain_cases() -> Iterable[Case]:
    """The colour and the shape of every plainly drawn picture."""
    for picture, colour, shape in plain_pictures():
        question = f"What colour is the {shape}?"
        yield Case("plain colour", picture, question, colour, PLAIN_COLOURS)
        question = "What shape is this?"
        yield Case("plain shape", picture, question, shape, PLAIN_SHAPES)


def evaluate(answer: Answerer, cases: Iterable[Case]) -> dict[str, dict[str, Any]]:
    """Figures by kind, and over all ``KINDS``: neither captions nor halves."""
    tallies: dict[str, Tally] = {}
    for case in cases:
        said = answer(case.picture, case.question)
        names = [case.kind, "all questions"] if case.kind in KINDS else [case.kind]
        for name in names:
            tallies.setdefault(name, Tally()).add(case, said)
    return {name: tally.row() for name, tally in tallies.items()}


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| question | n | right | 95% interval | chance, uniform / majority |",
        "|---|--:|--:|---|---|",
    ]
    for name, row in figures.items():
        low, high = row["interval_95"]
        lines.append(
            f"| {name} | {row['n']:,} | {row['accuracy']:.1%} | {low:.1%} to {high:.1%} "
            f"| {row['chance_uniform']:.1%} / {row['chance_majority']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="model folder (default: mm1-tiny)")
    parser.add_argument("-n", type=int, default=2000, help="held-out pictures")
    parser.add_argument(
        "--split", default="held_out", choices=("held_out", "validation")
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()

    from mm1_mlx.blas import preload_blas

    preload_blas()
    from mm1_mlx import generate, load

    with load(arguments.model) as runtime:

        def answer(picture: Image.Image, question: str) -> str:
            return generate(runtime, question, [picture], max_tokens=64).text

        figures = evaluate(answer, scene_cases(arguments.n, arguments.split))
        plain = evaluate(answer, plain_cases())
        figures |= {k: row for k, row in plain.items() if k.startswith("plain")}
    print(table(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
        print(f"written to {arguments.json}", file=sys.stderr)


if __name__ == "__main__":
    main()
