"""The kept figures of Core ML packages hold what is promised, and the manual shows them."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import coreml, coreml_mac
from mm1_mlx.coreml.backend import open_core_ml, open_interpreter
from mm1_mlx.presets import PRESETS

ROOT = Path(__file__).parents[2]
FIGURES = json.loads((ROOT / "benchmarks/results/coreml.json").read_text())
ROWS = FIGURES["rows"]


def test_every_way_of_the_embedded_model_is_there():
    assert {f"mm1-tiny, {way}" for way in coreml.WAYS} <= ROWS.keys()


def test_half_precision_is_as_near_as_promised():
    for name, row in ROWS.items():
        if name.endswith(", fp16"):
            assert row["l2"] <= 2.5e-3
            assert row["largest"] <= 6e-3
            assert row["stages"][-1]["name"] == "image_tokens"


def test_the_full_size_is_saved_within_its_bounds():
    for way in coreml.FULL_WAYS:
        row = ROWS[f"mm1-3b, {way}"]
        assert row["peak_bytes"] < 5e9
        assert row["seconds"] < 120
    row = ROWS["mm1-3b, fp16"]
    # Two bytes a weight of ViT-H/14 and a C-Abstractor.
    assert 1.25e9 < row["bytes"] < 1.4e9
    blocks = PRESETS[coreml.FULL].vision.depth
    assert sum("layers" in stage["name"] for stage in row["stages"]) == blocks


def test_the_manual_shows_them():
    text = (ROOT / "apps/macos/coreml.md").read_text()
    assert coreml.table(FIGURES) in text


def test_a_mac_measures_every_package():
    """Here with the interpreter in Core ML's place."""
    found = coreml_mac.row("fp16", "CPU_ONLY", open_interpreter, 1)
    assert 1e-4 < found["l2_from_model"] < 2.5e-3
    assert found["l2_from_interpreter"] == 0
    assert found["compute_units"] == "CPU_ONLY"
    assert found["seconds"] > 0
    assert coreml_mac.PLANS.keys() == coreml.WAYS.keys()


@pytest.mark.skipif(sys.platform != "darwin", reason="Core ML is macOS's")
@pytest.mark.parametrize("name", coreml_mac.PLANS)
def test_core_ml_gives_what_the_interpreter_gives(name):
    found = coreml_mac.row(name, "CPU_ONLY", open_core_ml, 1)
    assert found["l2_from_interpreter"] < 1e-2


@pytest.mark.drill
def test_a_row_is_measured(tmp_path, make_config):
    config = replace(make_config(), decoder=None, prompt=None)
    folder = coreml.random_encoder(tmp_path / "model", config)
    row = coreml.row(folder, tmp_path, "fp16")
    assert row["l2"] < 2.5e-3
    assert row["bytes"] > 10_000
    assert row["processor_seconds"] > 0
    assert row["peak_bytes"] > 50e6
    assert row["stages"][-1]["name"] == "image_tokens"
