"""A JSONL file as rows by number: indexed once, a row parsed when it is asked for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm1_mlx.errors import DataError
from mm1_mlx.train.data.example import Record

# Bytes of one line, pictures as data URIs included.
MAX_ROW_BYTES = 256 << 20
# And values, each of which is an object of some 60 bytes once it is read.
MAX_VALUES = 4_000_000
_CHUNK = 16 << 20
_NEWLINE = 10
# A shorter line may be blank; no row is so short.
_SHORT = 8
_BOM = b"\xef\xbb\xbf"


class JsonLines:
    """The rows of a file with one JSON object a line; blank lines are none.

    Only the lines' byte offsets are held: 8 bytes a row.

    Raises:
        DataError: the file cannot be read.
    """

    # Every row is read by itself.
    blocks = None

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._ends, self.digest = _line_ends(path)
            kept = self._not_blank()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        # Which lines are rows; None where all are.
        self._lines = None if kept.size == self._ends.size else kept

    def __len__(self) -> int:
        return len(self._ends if self._lines is None else self._lines)

    def __getitem__(self, index: int) -> Record:
        line = index if self._lines is None else int(self._lines[index])
        origin = f"{self.path}:{line + 1}"
        row = parse_row(self._read(line, origin), origin)
        return Record(row, origin, self.path.parent)

    def _not_blank(self) -> NDArray[np.int64]:
        """Which lines hold something."""
        lengths = np.diff(self._ends, prepend=0)
        blank = lengths <= 1
        with self.path.open("rb") as file:
            for line in np.flatnonzero((lengths > 1) & (lengths <= _SHORT)):
                file.seek(self._ends[line] - lengths[line])
                text = file.read(int(lengths[line]))
                blank[line] = not text.removeprefix(_BOM).strip()
        return np.flatnonzero(~blank)

    def _read(self, line: int, origin: str) -> bytes:
        start = int(self._ends[line - 1]) if line else 0
        length = int(self._ends[line]) - start
        if length > MAX_ROW_BYTES:
            raise DataError(
                f"{origin}: the line has {length} bytes, expected at most "
                f"{MAX_ROW_BYTES}; keep pictures in files of their own"
            )
        try:
            # Opened anew: no place in a file to share among threads.
            with self.path.open("rb") as file:
                file.seek(start)
                data = file.read(length)
        except OSError as error:
            raise DataError(f"{origin}: cannot be read: {error.strerror}") from None
        if len(data) < length:
            raise DataError(f"{origin}: the file has been cut since the run began")
        return data.removeprefix(_BOM) if line == 0 else data


def parse_row(data: bytes, origin: str) -> dict[str, Any]:
    """The JSON object that bytes in UTF-8 spell out.

    Raises:
        DataError: they do not.
    """
    # A value that is not the first of its list or object stands behind a comma.
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise DataError(
            f"{origin}: the row may hold more than {MAX_VALUES:,} values, which take too "
            "much memory"
        )
    why = ""
    try:
        row = json.loads(data.decode())
    except UnicodeDecodeError:
        raise DataError(f"{origin}: not UTF-8; convert the file first") from None
    except json.JSONDecodeError as error:
        row, why = None, f"; {error.msg} at column {error.colno}"
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, dict):
        return row
    hint = "; write a list's items as lines: jq -c '.[]'" if data[:1] == b"[" else ""
    raise DataError(
        f"{origin}: expected a JSON object, got {data[:60].decode(errors='replace')!r}"
        f"{why}{hint}"
    )


def _line_ends(path: Path) -> tuple[NDArray[np.int64], bytes]:
    """The byte behind every line, its newline included, and the file's SHA-256."""
    ends, read, last, digest = [], 0, _NEWLINE, hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            codes = np.frombuffer(chunk, np.uint8)
            ends.append(np.flatnonzero(codes == _NEWLINE) + (read + 1))
            read += len(chunk)
            last = chunk[-1]
            digest.update(chunk)
    if last != _NEWLINE:
        ends.append(np.array([read]))
    found = np.concatenate(ends).astype(np.int64) if ends else np.zeros(0, np.int64)
    return found, digest.digest()
