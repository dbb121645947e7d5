"""The embedded model is as good as its documents say."""

import json
from pathlib import Path

import pytest

from benchmarks.shapes import evaluate as shapes
from benchmarks.shapes.cases import scene_cases
from benchmarks.shapes.evaluate import evaluate, table
from benchmarks.shapes.scene import FEW
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
            lambda cases: [
                generate(runtime, case.question, case.pictures).text for case in cases
            ],
            scene_cases(60, counts=FEW),
        )
    for kind in ("colour", "shape", "where", "all questions"):
        # Three standard errors: of four kinds one is outside of two by chance too often.
        share, count = measured[kind]["accuracy"], figures[kind]["n"]
        error = (share * (1 - share) / count) ** 0.5
        assert abs(figures[kind]["accuracy"] - share) <= 3 * error, kind
    assert figures["all questions"]["accuracy"] > 0.93
