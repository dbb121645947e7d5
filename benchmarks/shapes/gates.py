"""What the embedded model has to reach: ``python -m benchmarks.shapes.gates``.

Tier A are shares of right answers. Tier B asks that the 95% interval lies above chance and
above what the first version answered; what it aims at stands beside it. Reads what
``evaluate`` measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
TIER_A = {
    "colour": 0.99,
    "shape": 0.99,
    "count to 4": 0.95,
    "where": 0.95,
    "exists": 0.97,
    "caption": 0.90,
}
# What is aimed at.
TIER_B = {
    "two pictures": 0.92,
    "box": 0.90,
    "read": 0.90,
    "read small, with parts": 0.90,
    "new word, 8 shots": 0.85,
    "new word, 8 shots, all held out": 0.85,
}
# What is read less well as one picture than with parts of it.
SMALL, IN_PARTS = "read small, one picture", "read small, with parts"

Figures = Mapping[str, Mapping[str, Any]]


class Gate(NamedTuple):
    """A bar.

    Attributes:
        kind: of question.
        right: share of right answers.
        bar: what it, or the lower end of its interval, has to reach.
        aim: what it is to be, None where that is the bar.
        reached: whether the bar is.
    """

    kind: str
    right: float
    bar: float
    aim: float | None
    reached: bool


def gates(figures: Figures, first: Figures) -> list[Gate]:
    """Every bar, for the figures of a model and of the first version."""
    found = []
    for kind, bar in TIER_A.items():
        right = figures[kind]["accuracy"]
        found.append(Gate(kind, right, bar, None, right >= bar))
    for kind, aim in TIER_B.items():
        row = figures[kind]
        bar = max(
            row["chance_uniform"], row["chance_majority"], first[kind]["accuracy"]
        )
        low = row["interval_95"][0]
        found.append(Gate(kind, row["accuracy"], bar, aim, low > bar))
    whole, parts = figures[SMALL], figures[IN_PARTS]
    bar = whole["interval_95"][1]
    name = f"{IN_PARTS}, above {SMALL.rpartition(', ')[2]}"
    low = parts["interval_95"][0]
    return [*found, Gate(name, parts["accuracy"], bar, None, low > bar)]


def table(found: list[Gate]) -> str:
    """The bars as a Markdown table."""
    lines = ["| | right | bar | aim | |", "|---|--:|--:|--:|---|"]
    for gate in found:
        aim = "" if gate.aim is None else f"{gate.aim:.0%}"
        said = "reached" if gate.reached else "**missed**"
        lines.append(
            f"| {gate.kind} | {gate.right:.1%} | {gate.bar:.1%} | {aim} | {said} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figures", type=Path, default=HERE / "results.json")
    parser.add_argument("--first", type=Path, default=HERE / "results-first.json")
    arguments = parser.parse_args()
    figures, first = (
        json.loads(path.read_text()) for path in (arguments.figures, arguments.first)
    )
    found = gates(figures, first)
    print(table(found))
    sys.exit(not all(gate.reached for gate in found))


if __name__ == "__main__":
    main()
