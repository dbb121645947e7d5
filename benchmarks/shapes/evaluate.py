"""Held-out accuracy: ``python -m benchmarks.shapes.evaluate --model PATH``.

Greedy answers, exact match after lower-casing. Every held-out picture shows at least one
pair of colour and shape that no training picture did, and what is asked is about it where
the question is about one object.
"""

from __future__ import annotations

import argparse
import json
import math
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
from benchmarks.shapes.questions import caption, questions
from benchmarks.shapes.scene import Split, random_scene, split_rng

# A picture and a question in, an answer out.
Answerer = Callable[[Image.Image, str], str]
# One case: kind, picture, question, expected answer, options it leaves open.
Case = tuple[str, Image.Image, str, str, tuple[str, ...]]


@dataclass
class Tally:
    """Right and wrong answers of one kind, and what guessing would have given."""

    right: int = 0
    total: int = 0
    # Sum over questions of 1 / options.
    uniform: float = 0.0
    answers: Counter[str] = field(default_factory=Counter)

    def add(self, right: bool, answer: str, options: int) -> None:
        """Count one question."""
        self.right += right
        self.total += 1
        self.uniform += 1 / options if options else 0
        self.answers[answer] += 1

    def row(self) -> dict[str, Any]:
        """The figures, as JSON values."""
        low, high = wilson(self.right, self.total)
        return {
            "n": self.total,
            "accuracy": round(self.right / self.total, 4),
            "interval_95": [round(low, 4), round(high, 4)],
            "chance_uniform": round(self.uniform / self.total, 4),
            "chance_majority": round(max(self.answers.values()) / self.total, 4),
        }


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion."""
    p = right / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    half /= 1 + z * z / total
    return centre - half, centre + half


def normalise(answer: str) -> str:
    """Lower case, without surrounding space."""
    return answer.strip().lower()


def scene_cases(num_pictures: int, split: Split = "held_out") -> Iterable[Case]:
    """One question of each kind, and a caption, about each of the split's pictures."""
    for seed in range(num_pictures):
        rng = split_rng(split, seed)
        scene = random_scene(rng, split)
        picture = draw(scene)
        for q in questions(scene, rng):
            yield q.kind, picture, q.text, q.answer, q.options
        instruction, sentence = caption(scene, rng)
        yield "caption", picture, instruction, sentence, ()


def plain_cases() -> Iterable[Case]:
    """The colour and the shape of every plainly drawn picture."""
    for picture, colour, shape in plain_pictures():
        question = f"What colour is the {shape}?"
        yield "plain colour", picture, question, colour, PLAIN_COLOURS
        yield "plain shape", picture, "What shape is this?", shape, PLAIN_SHAPES


def evaluate(answer: Answerer, cases: Iterable[Case]) -> dict[str, dict[str, Any]]:
    """Figures by kind of question, and over all of them but captions."""
    tallies: dict[str, Tally] = {}
    for kind, picture, question, expected, options in cases:
        right = normalise(answer(picture, question)) == normalise(expected)
        kinds = [kind] if kind == "caption" else [kind, "all questions"]
        for name in kinds:
            tally = tallies.setdefault(name, Tally())
            tally.add(right, normalise(expected), len(options))
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
