"""A package appears when it is whole, and replaces nothing unasked."""

import subprocess
import sys

import pytest

from mm1_mlx.coreml import package
from mm1_mlx.coreml.package import export
from mm1_mlx.coreml.place import written_beside
from mm1_mlx.coreml.program import Plan
from mm1_mlx.errors import CheckpointError


def make(path, text):
    path.mkdir()
    (path / "Manifest.json").write_text(text)


def test_it_is_put_in_its_place_at_once(tmp_path):
    out = tmp_path / "new" / "E.mlpackage"
    with written_beside(out, overwrite=False) as made:
        make(made, "1")
        assert not out.exists()
        other = written_beside(out, overwrite=False)
        with pytest.raises(CheckpointError, match="another run is at work"):
            other.__enter__()
    assert (out / "Manifest.json").read_text() == "1"
    assert [x.name for x in out.parent.iterdir()] == [out.name]


def test_an_error_leaves_what_was_there(tmp_path):
    out = tmp_path / "E.mlpackage"
    make(out, "old")

    def fail():
        with written_beside(out, overwrite=True) as made:
            make(made, "new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (out / "Manifest.json").read_text() == "old"
    assert [x.name for x in tmp_path.iterdir()] == [out.name]
    with written_beside(out, overwrite=True) as made:
        make(made, "new")
    assert (out / "Manifest.json").read_text() == "new"
    assert [x.name for x in tmp_path.iterdir()] == [out.name]


def test_what_a_killed_run_left_goes_with_the_next(tmp_path):
    out = tmp_path / "E.mlpackage"
    code = (
        "import os, sys; from pathlib import Path\n"
        "from mm1_mlx.coreml.place import written_beside\n"
        "with written_beside(Path(sys.argv[1]), overwrite=False) as made:\n"
        "    made.mkdir(); (made / 'half').write_text('x'); os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(out)], check=False)
    assert ended.returncode == -9
    assert not out.exists()
    assert list(tmp_path.iterdir())
    with written_beside(out, overwrite=False) as made:
        assert not made.exists()
        make(made, "1")
    assert [x.name for x in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize(
    ("name", "there", "overwrite", "said"),
    [
        ("E.zip", None, False, r"end it with \.mlpackage"),
        ("E.mlpackage", "package", False, "already exists; .*--overwrite"),
        ("E.mlpackage", "folder", True, "is no Core ML package, so it is not replaced"),
    ],
)
def test_places_that_are_refused(name, there, overwrite, said, tmp_path, member):
    out = tmp_path / name
    if there:
        make(out, "old")
        if there == "folder":
            (out / "Manifest.json").rename(out / "mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=said):
        export(member(), out, Plan(), overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_export_leaves_nothing(member, tmp_path, monkeypatch):
    """As where the disk is full while the package is described."""

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(package, "describe", fail)
    with pytest.raises(OSError, match="No space"):
        export(member(), tmp_path / "E.mlpackage", Plan())
    assert not list(tmp_path.iterdir())
