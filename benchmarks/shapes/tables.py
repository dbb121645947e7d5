"""What was measured, written into the documents: ``python -m benchmarks.shapes.tables``.

Tables between the marks in README.md here and in the project's, from results*.json and
fine_tune.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.shapes import evaluate, fine_tune, gates

HERE = Path(__file__).parent
README = HERE / "README.md"
PROJECT = HERE.parents[1] / "README.md"
# Kinds that the project's README shows, and what it calls them.
BRIEF = {
    "colour": "colour",
    "shape": "shape",
    "count to 4": "count, to 4",
    "count": "count, to 6",
    "exists": "exists",
    "where": "where",
    "caption": "caption: states nothing false",
    "caption, whole and in order": "caption: everything, in order",
    "box": "box, IoU above 0.5",
    "two pictures": "two pictures compared",
    "read": "word or number",
    "read small, one picture": "small ones, in one picture",
    "read small, with parts": "small ones, with four parts of it",
    "new word, 8 shots": "a new word from 8 examples",
    "new word, 8 shots, all held out": "the same, its examples held out, too",
    "in a word": "in a single word, as asked",
    "follow-up": "behind other questions",
    "after other pictures": "behind other pictures",
}

Figures = dict[str, dict[str, Any]]


def tables() -> dict[Path, dict[str, str]]:
    """Of every document the tables, by the marks that they stand between."""
    held_out, seen = gates.measured(""), gates.measured("-seen")
    return {
        README: {
            "gates": gates.table(*gates.read()),
            "results": evaluate.table(held_out),
            "seen": evaluate.table(seen),
            "fine-tuned": fine_tune.table(json.loads(fine_tune.RESULTS.read_text())),
        },
        PROJECT: {"embedded": brief(held_out, seen)},
    }


def brief(held_out: Figures, seen: Figures) -> str:
    """The kinds of ``BRIEF``, of both splits, as a Markdown table."""
    lines = [
        "| question | pairs that training shows | held-out pairs | chance |",
        "|---|--:|--:|--:|",
    ]
    for kind, name in BRIEF.items():
        row = held_out[kind]
        chance = max(row["chance_uniform"], row["chance_majority"])
        # Examples that are all held out are of that split alone.
        shown = f"{seen[kind]['accuracy']:.1%}" if kind in seen else ""
        lines.append(f"| {name} | {shown} | {row['accuracy']:.1%} | {chance:.1%} |")
    return "\n".join(lines)


def filled(text: str, mark: str, table: str) -> str:
    """A document with a table between its marks, in place of what stood there."""
    first, last = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, found, rest = text.partition(first)
    _, ended, behind = rest.partition(last)
    if not (found and ended):
        raise ValueError(f"no {first} with {last} behind it")
    return f"{before}{first}\n{table}\n{last}{behind}"


def main() -> None:
    for path, some in tables().items():
        text = path.read_text()
        for mark, table in some.items():
            text = filled(text, mark, table)
        path.write_text(text)


if __name__ == "__main__":
    main()
