"""The folder in which a model is written, beside its place until it is whole.

One run at a time writes there. What a killed or stopped one left is taken over by the
next that makes the same, shard by shard, and cleared away by any other.
"""

from __future__ import annotations

import glob
import hashlib
import json
import secrets
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mm1_mlx.errors import CheckpointError
from mm1_mlx.files import fsync, read_json, replace_json
from mm1_mlx.hold import LOCK, Hold

JOURNAL = "journal.json"
# They may round differently.
PROGRAMS = ("mm1-mlx", "mlx")


class Partial:
    """A folder beside a model's place, which one run holds.

    Its journal lists the shards that are on the disk, each with its bytes and sha256.

    Args:
        out: the model's place.
        fingerprint: of all that the model is made from; None where no later run can
            make the same.
    """

    def __init__(self, out: Path, fingerprint: str | None) -> None:
        self.out = out
        self.folder = beside(out, "partial")
        self.fingerprint = fingerprint
        self.shards: dict[str, dict[str, Any]] = {}
        self.made: list[Path] = []

    def open(self) -> None:
        """Hold the folder, with the shards that are there of this model and no other.

        A model that stepped aside comes back.

        Raises:
            CheckpointError: another run holds it.
        """
        # Nearest first.
        self.made = [path for path in self.out.parents if not path.exists()]
        self._hold = Hold(self.folder)
        try:
            for old in left_beside(self.out, "old"):
                if self.out.exists():
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    old.rename(self.out)
            self.shards = self._shards_there()
            self._clear()
        except BaseException:
            self._hold.release()
            raise

    def record(self, name: str, shard: dict[str, Any]) -> None:
        """Note a shard that is written, once it is on the disk."""
        fsync(self.folder / name)
        self.shards[name] = shard
        self._note()

    def rename(self, names: Mapping[str, str]) -> None:
        """Give the shards their last names; a run killed meanwhile is gone on with."""
        for name, last in names.items():
            self.shards[name] = self.shards[name] | {"last": last}
        self._note()
        for name, last in names.items():
            (self.folder / name).rename(self.folder / last)

    def publish(self, *, overwrite: bool) -> None:
        """Put the folder in its place; an old one steps aside first and goes last.

        Raises:
            CheckpointError: something came to be there meanwhile.
        """
        fsync(self.folder)
        old = beside(self.out, f"old-{secrets.token_hex(4)}")
        if self.out.exists():
            if not overwrite:
                raise CheckpointError(
                    f"{str(self.out)!r} was made by somebody else meanwhile; choose "
                    "another name"
                )
            self.out.rename(old)
        try:
            self.folder.rename(self.out)
        except BaseException:
            if old.exists():
                old.rename(self.out)
            raise
        # Only now: without them the folder would be another run's to clear away.
        for name in (JOURNAL, LOCK):
            (self.out / name).unlink(missing_ok=True)
        self._hold.release()
        fsync(self.out.parent)
        shutil.rmtree(old, ignore_errors=True)

    def leave(self) -> bool:
        """Let the folder go, and whether it stays because the next run can use it."""
        if self.fingerprint is None or not (self.folder / JOURNAL).is_file():
            self.remove()
            return False
        with suppress(OSError):
            self._clear()
        self._hold.release()
        return True

    def remove(self) -> None:
        """Take the folder away, and those that were made for it and are empty."""
        self._hold.remove()
        if not self.out.exists():
            with suppress(OSError):
                for path in self.made:
                    path.rmdir()

    def _note(self) -> None:
        content = {"fingerprint": self.fingerprint, "shards": self.shards}
        replace_json(self.folder / JOURNAL, content)

    def _clear(self) -> None:
        """Take away what is not of this model's shards."""
        self._hold.clear(*((JOURNAL, *self.shards) if self.shards else ()))

    def _shards_there(self) -> dict[str, dict[str, Any]]:
        """The whole shards in the folder, if they were made from the same."""
        there = {}
        # Whatever else may stand in a journal was not written here.
        with suppress(CheckpointError, KeyError, TypeError, AttributeError):
            journal = read_json(self.folder / JOURNAL)
            if self.fingerprint is None or journal["fingerprint"] != self.fingerprint:
                return {}
            for name, shard in journal["shards"].items():
                for path in {name, shard.get("last", name)}:
                    if _size(self.folder / path) == shard["bytes"]:
                        if path != name:
                            (self.folder / path).rename(self.folder / name)
                        there[name] = shard
        return there


def beside(out: Path, kind: str) -> Path:
    """A path next to a model's place; nobody else would give one such a name."""
    return out.with_name(f"{out.name}.mm1-{kind}")


def left_beside(out: Path, kind: str) -> list[Path]:
    """The folders of a kind next to a model's place."""
    return sorted(out.parent.glob(f"{glob.escape(out.name)}.mm1-{kind}-*"))


def fingerprint(facts: Mapping[str, Any]) -> str:
    """A digest of all that decides what is written, the programs that do it included."""
    programs = {name: version(name) for name in PROGRAMS}
    return hashlib.sha256(json.dumps({**programs, **facts}).encode()).hexdigest()


def stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """What tells files apart that are not read: their places, sizes and times."""
    stats = [(path.absolute(), path.stat()) for path in paths]
    return [(str(path), x.st_size, x.st_mtime_ns) for path, x in stats]


def _size(path: Path) -> int | None:
    """A file's size in bytes, None where there is none."""
    return path.stat().st_size if path.is_file() else None
