"""The embedded model is as good as its documents say."""

import json
from pathlib import Path

import pytest

from benchmarks.shapes import evaluate as shapes
from benchmarks.shapes.evaluate import evaluate, scene_cases, table
from mm1_mlx import generate, load

FOLDER = Path(shapes.__file__).parent
FIGURES = ["results.json", "results-seen.json"]


@pytest.mark.parametrize("name", FIGURES)
def test_documents_hold_the_measured_figures(name):
    figures = json.loads((FOLDER / name).read_text())
    text = (FOLDER / "README.md").read_text()
    rows = table(figures).splitlines()[2:]
    if name != "results.json":
        rows = [row for row in rows if not row.startswith("| plain")]
    assert len(rows) >= 8
    assert all(row in text for row in rows)


@pytest.mark.slow
def test_held_out_pictures_are_answered_as_measured():
    """A sample of what results.json measured: fewer right would be another model."""
    measured = json.loads((FOLDER / "results.json").read_text())
    with load() as runtime:
        figures = evaluate(
            lambda picture, question: generate(runtime, question, [picture]).text,
            scene_cases(60),
        )
    for kind in ("colour", "shape", "where", "all questions"):
        low, high = figures[kind]["interval_95"]
        assert low <= measured[kind]["accuracy"] <= high, kind
    assert figures["all questions"]["accuracy"] > 0.93
