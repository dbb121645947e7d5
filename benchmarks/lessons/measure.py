"""The share of cases whose right text a model finds likeliest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.lessons.cases import Case, cases_of
from benchmarks.lessons.points import NUMBER, Point, measures_of
from mm1_mlx.batch import Ask
from mm1_mlx.errors import MM1Error
from mm1_mlx.likelihood import Candidates, loglikelihoods
from mm1_mlx.runtime import Runtime, load


def measure(
    point: Point, folder: Path, seed: int, number: int = NUMBER
) -> dict[str, Any]:
    """The figures of the model that was written into a folder, by measure."""
    with load(folder) as runtime:
        return {
            name: figures(runtime, cases_of(name, number, seed))
            for name in measures_of(point)
        }


def figures(runtime: Runtime, cases: Iterable[Case]) -> dict[str, Any]:
    """Share that is right, what guessing gives, and right and asked of every kind."""
    held = list(cases)
    right: Counter[str] = Counter()
    asked = Counter(case.kind for case in held)
    for number, found in loglikelihoods(runtime, map(_candidates, held)):
        if isinstance(found, MM1Error):
            raise found
        scores = [text.logprob for text in found]
        right[held[number].kind] += scores.index(max(scores)) == held[number].right
    return {
        "right": right.total() / len(held),
        "n": len(held),
        "chance": sum(1 / len(case.texts) for case in held) / len(held),
        "kinds": {kind: [right[kind], asked[kind]] for kind in sorted(asked)},
    }


def _candidates(case: Case) -> Candidates:
    pictures = [part for part in case.parts if isinstance(part, Image.Image)]
    content = [
        {"type": "image"}
        if isinstance(part, Image.Image)
        else {"type": "text", "text": part}
        for part in case.parts
    ]
    ask = Ask([{"role": "user", "content": content}], pictures)
    return Candidates(ask, case.texts)
