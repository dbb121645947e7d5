"""The embedded model is as good as its documents say."""

import json
import re
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.shapes import curve, fine_tune, gallery, gates, tables
from benchmarks.shapes import evaluate as shapes
from benchmarks.shapes.cases import scene_cases
from benchmarks.shapes.evaluate import answerer, evaluate
from benchmarks.shapes.scene import FEW
from mm1_mlx.files import sha256
from mm1_mlx.runtime import TINY

FOLDER = Path(shapes.__file__).parent


def test_documents_hold_what_was_measured():
    for path, some in tables.tables().items():
        text = path.read_text()
        for mark, table in some.items():
            assert len(table.splitlines()) > 5
            assert tables.filled(text, mark, table) == text, (path, mark)


@pytest.mark.parametrize("split", ["", "-seen"])
def test_two_thousand_of_each_were_asked_of_these_weights(split):
    assert gates.kept(split)["model"] == sha256(TINY / "model.safetensors")
    plain = ("plain colour", "plain shape")
    for kind, row in gates.measured(split).items():
        # Plain pictures are as many as there are.
        assert row["n"] >= 2000 or (kind in plain and row["n"] == 288), kind


def test_the_model_and_its_logs_are_of_the_recipe(recipe, embedded):
    assert embedded == recipe.config
    assert (TINY / "model.safetensors").stat().st_size <= 6_000_000
    logs = sorted(FOLDER.glob("log/*.jsonl"))
    assert [re.sub(r"^\d+-", "", log.stem) for log in logs] == [
        stage.name for stage in recipe.stages
    ]
    for log, stage in zip(logs, recipe.stages, strict=True):
        last = json.loads(log.read_text().splitlines()[-1])
        # What is logged is every so many steps.
        assert 0 <= stage.end - last["step"] < stage.train.log_every, log.name


def test_the_learning_curve_ends_with_what_is_shipped():
    points = json.loads(curve.FIGURES.read_text())
    assert len(points) > 5
    steps = [point["step"] for point in points]
    assert steps == sorted(steps)
    assert points[-1]["model"] == sha256(TINY / "model.safetensors")
    for kind in ("colour", "read", "two pictures"):
        assert points[-1][kind]["accuracy"] > points[0][kind]["accuracy"]


@pytest.mark.slow
def test_the_galleries_show_what_the_model_answers(tmp_path, monkeypatch):
    """What is first in a few cases is first in all of them."""
    monkeypatch.setattr(gallery, "FOLDER", tmp_path / "gallery")
    rows = gallery.write(gallery.answered(None, 4))
    assert len(rows) >= len(gallery.KINDS)
    brief = [row for row in rows if row[0] in gallery.BRIEF]
    for path, some in ((gallery.README, rows), (gallery.PROJECT, brief)):
        folder = FOLDER.relative_to(path.parent) / "gallery"
        shown = path.read_text().splitlines()
        assert set(gallery.table(some, folder.as_posix()).splitlines()) <= set(shown)


@pytest.mark.slow
def test_held_out_pictures_are_answered_as_measured():
    """A sample of what results.json measured: fewer right would be another model."""
    measured = gates.measured("")
    with ExitStack() as stack:
        figures = evaluate(answerer(None, stack), scene_cases(60, counts=FEW))
    for kind in ("colour", "shape", "where", "all questions"):
        # Three standard errors: of four kinds one is outside of two by chance too often.
        share, count = measured[kind]["accuracy"], figures[kind]["n"]
        error = (share * (1 - share) / count) ** 0.5
        assert abs(figures[kind]["accuracy"] - share) <= 3 * error, kind
    assert figures["all questions"]["accuracy"] > 0.93


def test_a_new_shape_is_learned_as_was_set_out():
    result = json.loads(fine_tune.RESULTS.read_text())
    assert result["model"] == sha256(TINY / "model.safetensors")
    assert result["flags"] == fine_tune.flags()
    assert result["scale"] == fine_tune.SCALE
    assert result["chosen on"] == fine_tune.CHOSEN_ON
    told = " ".join(tables.README.read_text().split())
    assert f"fine_tune runs/arrow -n {result['cases']} " in told
    assert f"{fine_tune.PICTURES:,} of the conversations" in told
    assert f"{result['scale']} is added" in told
    assert f"on the first {fine_tune.CHOSEN_ON:,} cases of each kind" in told
    assert result["verdict"] == fine_tune.verdict(result)
    assert all(result["verdict"].values())
