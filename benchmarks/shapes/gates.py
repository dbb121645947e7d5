"""What the embedded model has to reach: ``python -m benchmarks.shapes.gates``.

Tier A are shares of right answers. Tier B asks that the 95% interval lies above chance and
above what the first version answered; what it aims at stands beside it. Held to them is
what was measured on new pictures of pairs that training shows, and of those that it never
does. Reads what ``evaluate`` wrote.
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
# Not asked of pairs that training shows.
HELD_OUT_ALONE = "new word, 8 shots, all held out"
# What is aimed at.
TIER_B = {
    "two pictures": 0.92,
    "box": 0.90,
    "read": 0.90,
    "read small, with parts": 0.90,
    "new word, 8 shots": 0.85,
    HELD_OUT_ALONE: 0.85,
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


def gates(figures: Figures, first: Figures, *, held_out: bool) -> list[Gate]:
    """Every bar, for the figures of a model and of the first version, of one split."""
    found = []
    for kind, bar in TIER_A.items():
        right = figures[kind]["accuracy"]
        found.append(Gate(kind, right, bar, None, right >= bar))
    for kind, aim in TIER_B.items():
        if kind == HELD_OUT_ALONE and not held_out:
            continue
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


def table(seen: list[Gate], held_out: list[Gate]) -> str:
    """The bars as a Markdown table: of pairs that training shows, and of the others."""
    lines = [
        "| | aim | pairs that training shows | bar | | held-out pairs | bar | |",
        "|---|--:|--:|--:|---|--:|--:|---|",
    ]
    shown = {gate.kind: gate for gate in seen}
    for gate in held_out:
        aim = "" if gate.aim is None else f"{gate.aim:.0%}"
        cells = " | ".join(_cells(x) for x in (shown.get(gate.kind), gate))
        lines.append(f"| {gate.kind} | {aim} | {cells} |")
    return "\n".join(lines)


def _cells(gate: Gate | None) -> str:
    if gate is None:
        return " | | "
    said = "reached" if gate.reached else "**missed**"
    return f"{gate.right:.1%} | {gate.bar:.1%} | {said}"


def measured(name: str) -> Figures:
    """What was measured and kept as ``results{name}.json``."""
    rows: Figures = kept(name)["figures"]
    return rows


def kept(name: str) -> dict[str, Any]:
    """The figures of ``results{name}.json``, and the digest of the weights they are of."""
    whole: dict[str, Any] = json.loads((HERE / f"results{name}.json").read_text())
    return whole


def read() -> tuple[list[Gate], list[Gate]]:
    """The bars of both splits, from what was measured and kept."""

    def of(split: str) -> list[Gate]:
        return gates(measured(split), measured(f"-first{split}"), held_out=not split)

    return of("-seen"), of("")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    seen, held_out = read()
    print(table(seen, held_out))
    sys.exit(not all(gate.reached for gate in (*seen, *held_out)))


if __name__ == "__main__":
    main()
