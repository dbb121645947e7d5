"""What a trained model takes over from the one it was made from, and where it may lie."""

import json
import shutil
from pathlib import Path

import pytest

from mm1_mlx.checkpoint import read_manifest
from mm1_mlx.errors import CheckpointError
from mm1_mlx.original import Original
from mm1_mlx.train.job import Job

QUICK = {"steps": 1, "batch_size": 2, "micro_batches": 1, "valid_share": 0.0}


@pytest.fixture
def base(write_folder, make_model, tmp_path):
    """A model's folder, of which a part needs training."""
    path = write_folder(tmp_path / "base", make_model())
    manifest = read_manifest(path)
    manifest["source"] |= {
        "needs_training": ["vision", "connector"],
        "parity_checked": True,
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.fixture
def data(write_rows, tmp_path):
    return str(write_rows(tmp_path / "rows", ["red", "blue", "green", "white"]))


def test_a_part_that_was_trained_needs_training_no_longer(base, data, tmp_path):
    job = Job(base, tmp_path / "run", "connector", QUICK | {"data": (data,)})
    made = job.run(lambda _: None)
    source = read_manifest(made)["source"]
    assert source["needs_training"] == ["vision"]
    assert source["trained"]["stage"] == "connector"
    assert source["name"] == "a test's"
    assert "parity_checked" not in source
    kept = {"tokenizer.json", "tokenizer_config.json"}
    assert all((made / x).read_bytes() == (base / x).read_bytes() for x in kept)


def test_a_part_needs_training_until_all_of_it_is_trained(base):
    original = Original(base)
    connector = [name for name in original.stored if name.startswith("connector.")]
    assert len(connector) > 1
    assert original.source(connector)["needs_training"] == ["vision"]
    assert original.source(connector[1:])["needs_training"] == ["vision", "connector"]
    assert original.source()["needs_training"] == ["vision", "connector"]


@pytest.mark.parametrize("place", [".", "run", "..", "run/.."])
def test_a_run_does_not_lie_in_its_model(place, base, data):
    before = sorted(base.rglob("*"))
    with pytest.raises(CheckpointError, match=r"is, holds or lies in '.*base'"):
        Job(base, base / place, "connector", QUICK | {"data": (data,)})
    assert sorted(base.rglob("*")) == before


def test_a_folder_of_splits_is_measured_by_its_valid_split(base, data, tmp_path):
    rows = Path(data)
    folder, lines = rows.parent, rows.read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "valid.jsonl").write_text(lines[0])
    rows.unlink()
    given = QUICK | {"data": (str(folder),), "valid": (str(folder),)}
    job = Job(base, tmp_path / "run", "connector", given)
    assert len(job._open(given, "train")) == 4
    assert len(job._open(given, "valid")) == 1


def test_its_files_are_taken_over_but_for_what_is_said_of_it_alone(base):
    (base / "parity.json").write_text("{}")
    manifest = read_manifest(base)
    manifest["files"]["parity.json"] = {"bytes": 2, "sha256": "0"}
    (base / "manifest.json").write_text(json.dumps(manifest))
    original = Original(shutil.copytree(base, base.with_name("copy")))
    assert set(original.kept) == {"tokenizer.json", "tokenizer_config.json"}
    assert set(original.files) == set(manifest["files"])
    assert original.stored.keys() == original.tensors().keys()
