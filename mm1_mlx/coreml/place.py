"""A package's place: it is written beside it, and renamed once it is whole."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mm1_mlx.errors import CheckpointError
from mm1_mlx.files import fsync
from mm1_mlx.hold import LOCK, Hold
from mm1_mlx.partial import beside

SUFFIX = ".mlpackage"


@contextmanager
def written_beside(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A path to write a package at, which stands in its place afterwards.

    After an error nothing is left; what a killed run left goes with the next one.

    Raises:
        CheckpointError: the place has not the suffix or is taken, or another run works
            there.
    """
    check_place(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    hold = Hold(beside(out, "partial"))
    try:
        _clear(hold.folder)
        made = hold.folder / out.name
        yield made
        for path in made.rglob("*"):
            fsync(path)
        _publish(made, out, overwrite=overwrite)
    finally:
        _clear(hold.folder)
        hold.remove()


def check_place(out: Path, *, overwrite: bool) -> None:
    """Pass only if a package may be written there; arguments and errors as above."""
    if out.suffix != SUFFIX:
        raise CheckpointError(
            f"{str(out)!r} is no name of a Core ML package; end it with {SUFFIX}"
        )
    if not out.exists():
        return
    if not overwrite:
        raise CheckpointError(
            f"{str(out)!r} already exists; choose another name or pass --overwrite"
        )
    if not (out / "Manifest.json").is_file():
        raise CheckpointError(
            f"{str(out)!r} is no Core ML package, so it is not replaced; choose another "
            "name"
        )


def _publish(made: Path, out: Path, *, overwrite: bool) -> None:
    """Put the package in its place; an old one steps aside first and goes last."""
    check_place(out, overwrite=overwrite)
    old = beside(out, f"old-{secrets.token_hex(4)}")
    if out.exists():
        out.rename(old)
    try:
        made.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    fsync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
