"""The folder in which a model is written, beside its place until it is whole.

What a killed run left there is taken over by the next that makes the same, shard by
shard, and cleared away by any other.
"""

from __future__ import annotations

import glob
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from mm1_mlx.errors import CheckpointError
from mm1_mlx.files import fsync, read_json, replace_json

JOURNAL = "journal.json"


class Partial:
    """A folder beside a model's place, this process's own.

    Its journal lists the shards that are on the disk, each with its bytes and sha256.

    Args:
        out: the model's place.
        fingerprint: of all that the model is made from; None where no later run can
            make the same.
    """

    def __init__(self, out: Path, fingerprint: str | None) -> None:
        self.out = out
        self.folder = self._beside("partial")
        self.fingerprint = fingerprint
        self.shards: dict[str, dict[str, Any]] = {}
        self.made: list[Path] = []

    def tidy(self) -> None:
        """Clear away what killed runs left, but for what this one can go on with.

        A model that stepped aside comes back.
        """
        for left in self._left("old"):
            if self.out.exists():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.rename(self.out)
        for left in (*self._left("dead"), *self._left("partial")):
            self._claim(left)

    def open(self) -> None:
        """Make the folder, and what lies above it."""
        # Nearest first.
        self.made = [path for path in self.out.parents if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)

    def record(self, name: str, shard: dict[str, Any]) -> None:
        """Note a shard that is written, once it is on the disk."""
        fsync(self.folder / name)
        self.shards[name] = shard
        content = {"fingerprint": self.fingerprint, "shards": self.shards}
        replace_json(self.folder / JOURNAL, content)

    def publish(self, *, overwrite: bool) -> None:
        """Put the folder in its place; an old one steps aside first and goes last.

        Raises:
            CheckpointError: something came to be there meanwhile.
        """
        (self.folder / JOURNAL).unlink(missing_ok=True)
        fsync(self.folder)
        old = self._beside("old")
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
        fsync(self.out.parent)
        shutil.rmtree(old, ignore_errors=True)

    def remove(self) -> None:
        """Take the folder away, and those that were made for it and are empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if not self.out.exists():
            with suppress(OSError):
                for path in self.made:
                    path.rmdir()

    def _beside(self, kind: str) -> Path:
        """A folder next to the model's place; nobody else would give one such a name."""
        return self.out.with_name(f"{self.out.name}.mm1-{kind}-{os.getpid()}")

    def _left(self, kind: str) -> list[Path]:
        """Folders of this kind whose process is gone."""
        pattern = glob.escape(self.out.name) + f".mm1-{kind}-*"
        found = self.out.parent.glob(pattern)
        return [x for x in found if not _is_alive(x.name.rpartition("-")[2])]

    def _claim(self, left: Path) -> None:
        """Take over a dead run's folder, or else clear it away."""
        shards = None if self.shards else self._shards_in(left)
        # Whoever renames it has it: another process may want it, too.
        mine = self._beside("dead") if shards is None else self.folder
        with suppress(OSError):
            left.rename(mine)
            if shards is None:
                shutil.rmtree(mine, ignore_errors=True)
                return
            for path in mine.iterdir():
                if path.name not in (JOURNAL, *shards):
                    path.unlink()
            self.shards = shards

    def _shards_in(self, left: Path) -> dict[str, dict[str, Any]] | None:
        """The whole shards of a folder; None if it was made from something else."""
        try:
            journal = read_json(left / JOURNAL)
            if self.fingerprint is None or journal["fingerprint"] != self.fingerprint:
                return None
            return {
                name: shard
                for name, shard in journal["shards"].items()
                if (left / name).stat().st_size == shard["bytes"]
            }
        except (CheckpointError, OSError, KeyError, TypeError):
            return None


def _is_alive(process: str) -> bool:
    """Whether another process of this number runs, so that its folder is in use."""
    if not process.isdecimal() or int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
