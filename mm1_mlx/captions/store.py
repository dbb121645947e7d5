"""Where captions are kept: one file of JSON lines, or a file beside each picture."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from mm1_mlx.captions.folder import Pictures
from mm1_mlx.errors import DataError
from mm1_mlx.journal import Journal, encoded, written

# What came of a picture, without its name.
Row = dict[str, Any]
# Of the first line, which says what was asked.
VERSION = 1
# What the digest of a model decides, wherever it lies and whatever it is called.
NAMES = ("model", "adapters")


class Store(Protocol):
    """Keeps what came of pictures, and knows those that are done."""

    def done(self) -> dict[str, bool]:
        """The pictures that need not be asked about, and whether each has a caption."""
        ...

    def add(self, name: str, row: Row) -> None:
        """Keep what came of a picture.

        Raises:
            DataError: there is no room for it.
        """
        ...


class Lines:
    """One file of JSON lines; its first says what was asked. A context manager.

    Args:
        path: the file, made if it is not there.
        asked: what decides the captions, as JSON values.
        overwrite: begin again, whatever captions it holds.

    Raises:
        DataError: another run writes it, it is none of captions, or of others.
    """

    def __init__(
        self, path: Path, asked: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        self.path = path
        header = {"captions": VERSION, **json.loads(json.dumps(asked))}
        self._journal = Journal(path)
        try:
            self._lock()
            self._rows = self._read(header, overwrite)
        except BaseException:
            self._journal.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._journal.close()

    def done(self) -> dict[str, bool]:
        """The pictures that have a line: one that could not be read has one, too."""
        return dict(self._rows)

    def add(self, name: str, row: Row) -> None:
        """Append a picture's line."""
        self._journal.add({"file": name, **row})
        self._rows[name] = "error" not in row

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{self.path} is being written by another run; wait for its end, or give "
                "another --out"
            ) from None
        except OSError:
            pass  # Some disks have no locks.

    def _read(self, header: dict[str, Any], overwrite: bool) -> dict[str, bool]:
        lines = self._journal.read()
        if lines:
            self._check(lines[0], header, overwrite)
        if overwrite:
            self._journal.file.truncate(0)
            lines = []
        if not lines:
            self._journal.add(header)
        rows = {}
        for number, text in enumerate(lines[1:], start=2):
            row = _parsed(text)
            name = row.get("file")
            if not isinstance(name, str):
                raise DataError(
                    f"{self.path}:{number}: no line of a picture; remove it to go on"
                )
            rows[name] = "error" not in row
        return rows

    def _check(self, line: bytes, header: dict[str, Any], overwrite: bool) -> None:
        before = _parsed(line)
        if before.get("captions") != VERSION:
            raise DataError(
                f"{self.path} is no file of captions that is known here; give another --out"
            )
        if overwrite:
            return
        keys = [*header, *(key for key in before if key not in header)]
        for key in keys:
            if key in NAMES or before.get(key) == header.get(key):
                continue
            was, now = before.get(key), header.get(key)
            if key == "digest":
                key = "another model or adapter:"
                was, now = (
                    f"{x.get('model')} {x.get('digest')!s:.12}"
                    for x in (before, header)
                )
            raise DataError(
                f"{self.path} was begun with {key} {was!r:.80}, not {now!r:.80}; give "
                "another --out, or --overwrite to begin again"
            )


class Sidecars:
    """A file beside each picture, written whole; those that are there stay.

    Args:
        pictures: the pictures.
        suffix: ``.txt`` for the caption alone, ``.json`` for all that is known.
        overwrite: write them again.
    """

    def __init__(
        self, pictures: Pictures, suffix: str, *, overwrite: bool = False
    ) -> None:
        self._paths = pictures.sidecars(suffix)
        self._overwrite = overwrite

    def done(self) -> dict[str, bool]:
        """The pictures that have a file beside them."""
        if self._overwrite:
            return {}
        return {name: True for name, path in self._paths.items() if path.exists()}

    def add(self, name: str, row: Row) -> None:
        """Write a caption; a picture without one keeps none, and is asked about again."""
        if "error" in row:
            return
        path = self._paths[name]
        text = encoded(row)
        if path.suffix == ".txt":
            caption = row["caption"] if "caption" in row else json.dumps(row["data"])
            text = f"{caption}\n".encode()
        # One run's leavings are the next one's to write over.
        partial = path.with_name(f".{path.name}.partial")
        with written(path):
            partial.write_bytes(text)
            partial.replace(path)


def _parsed(line: bytes) -> dict[str, Any]:
    """The line's object, empty where it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
