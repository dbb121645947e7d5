"""Held-out accuracy: ``python -m benchmarks.shapes.evaluate --model PATH``.

Greedy answers. Every held-out picture shows at least one pair of colour and shape that no
training picture did, and what is asked is about it where the question is about one object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from benchmarks.shapes.cases import (
    PARTS,
    Case,
    Judge,
    likeliest,
    normalise,
    part_cases,
)
from benchmarks.shapes.questions import KINDS
from mm1_mlx.eval.intervals import wilson

# The answers to several cases, in their order.
Answerer = Callable[[list[Case]], list[str]]
# Asked at once.
BATCH = 16
MAX_TOKENS = 64
# What stands first in a table; the others come as they were asked.
FIRST = ("colour", "shape", "count", "count to 4", "exists", "where", "all questions")


@dataclass
class Tally:
    """Right and wrong answers of one kind, and what guessing would have given."""

    right: int = 0
    total: int = 0
    # Sum over questions of 1 / options.
    uniform: float = 0.0
    # Of each form of question, and how its answers are judged.
    answers: dict[tuple[Judge, tuple[str, ...]], Counter[str]] = field(
        default_factory=dict
    )
    unseen: int = 0

    def add(self, case: Case, answer: str) -> None:
        """Count one question."""
        form, expected = case.blind
        self.right += case.is_right(answer)
        self.total += 1
        self.uniform += 1 / len(case.options) if case.options else 0
        self.answers.setdefault((case.judge, form), Counter())[expected] += 1
        self.unseen += normalise(answer) in case.unseen

    def row(self) -> dict[str, Any]:
        """The figures, as JSON values."""
        majority = sum(likeliest(how[0], told) for how, told in self.answers.items())
        return counted(self.right, self.total) | {
            "chance_uniform": round(self.uniform / self.total, 4),
            "chance_majority": round(majority / self.total, 4),
            "answered_unseen_pair": round(self.unseen / self.total, 4),
        }


def counted(right: int, total: int) -> dict[str, Any]:
    """So many of all, as JSON values."""
    low, high = wilson(right, total)
    return {
        "n": total,
        "accuracy": round(right / total, 4),
        "interval_95": [round(low, 4), round(high, 4)],
    }


def evaluate(answer: Answerer, cases: Iterable[Case]) -> dict[str, dict[str, Any]]:
    """Figures by kind, and over all ``KINDS``: neither captions nor halves."""
    tallies: dict[str, Tally] = {}
    for case, said in _answered(answer, cases):
        names = [case.kind, "all questions"] if case.kind in KINDS else [case.kind]
        for name in names:
            tallies.setdefault(name, Tally()).add(case, said)
    return {name: tally.row() for name, tally in tallies.items()}


def _answered(answer: Answerer, cases: Iterable[Case]) -> Iterator[tuple[Case, str]]:
    """Every case and what was said; what differs in its judge alone is asked once."""
    prompts = groupby(cases, key=_prompt)
    groups = (list(group) for _, group in prompts)
    while some := list(islice(groups, BATCH)):
        said = answer([group[0] for group in some])
        for group, text in zip(some, said, strict=True):
            yield from ((case, text) for case in group)


def _prompt(case: Case) -> tuple[Any, ...]:
    return case.question, case.mode, case.pictures, case.before, case.shots


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| question | n | right | 95% interval | chance, uniform / majority |",
        "|---|--:|--:|---|---|",
    ]
    for name in sorted(
        figures, key=lambda x: FIRST.index(x) if x in FIRST else len(FIRST)
    ):
        row = figures[name]
        low, high = row["interval_95"]
        lines.append(
            f"| {name} | {row['n']:,} | {row['accuracy']:.1%} | {low:.1%} to {high:.1%} "
            f"| {row['chance_uniform']:.1%} / {row['chance_majority']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of one file (default: mm1-tiny)")
    parser.add_argument("-n", type=int, default=2000, help="cases of each kind")
    parser.add_argument(
        "--split", default="held_out", choices=("held_out", "validation")
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="only these")
    parser.add_argument(
        "--json", type=Path, help="the figures' file; those of other parts stay there"
    )
    arguments = parser.parse_args()

    from mm1_mlx.blas import preload_blas

    preload_blas()
    from mm1_mlx.files import sha256
    from mm1_mlx.runtime import TINY

    kept = arguments.json
    whole = {"model": sha256(Path(arguments.model or TINY) / "model.safetensors")}
    figures: dict[str, dict[str, Any]] = {}
    if kept and kept.exists():
        begun = json.loads(kept.read_text())
        if begun["model"] != whole["model"]:
            sys.exit(f"error: {kept} is of another model; remove it")
        figures = begun["figures"]
    with ExitStack() as stack:
        answer = answerer(arguments.model, stack)
        for part in arguments.part or PARTS:
            cases = part_cases(part, arguments.n, arguments.split)
            figures |= evaluate(answer, cases)
            print(f"{part} done", file=sys.stderr, flush=True)
            # Hours of them may be behind it.
            if kept:
                kept.write_text(
                    json.dumps(whole | {"figures": figures}, indent=2) + "\n"
                )
    print(table(figures))


def answerer(
    model: str | None,
    stack: ExitStack,
    adapters: Sequence[Path | tuple[Path, float]] = (),
) -> Answerer:
    """What answers by a model, as it is and with parts of large pictures."""
    from mm1_mlx.answer import Settings
    from mm1_mlx.batch import Ask, generate_batch
    from mm1_mlx.errors import MM1Error
    from mm1_mlx.runtime import Runtime, load
    from mm1_mlx.shots import Shot

    runtimes: dict[str | None, Runtime] = {}

    def runtime_of(mode: str | None) -> Runtime:
        if mode not in runtimes:
            runtimes[mode] = stack.enter_context(
                load(model, resolution=mode, adapters=adapters)
            )
        return runtimes[mode]

    def answer(cases: list[Case]) -> list[str]:
        said: dict[int, str] = {}
        for mode in {case.mode for case in cases}:
            numbers = [i for i, case in enumerate(cases) if case.mode == mode]
            asks = []
            for case in (cases[i] for i in numbers):
                shots = [
                    Shot((shown,), text, case.question) for shown, text in case.shots
                ]
                shots += [
                    Shot(shown, text, question) for shown, question, text in case.before
                ]
                settings = Settings(max_tokens=MAX_TOKENS, shots=shots)
                asks.append(Ask(case.question, case.pictures, settings))
            found = generate_batch(runtime_of(mode), asks, size=BATCH)
            for i, one in zip(numbers, found, strict=True):
                if isinstance(one, MM1Error):
                    raise one
                said[i] = one.text
        return [said[i] for i in range(len(cases))]

    return answer


if __name__ == "__main__":
    main()
