"""A webdataset shard as rows by number: a tar file, read in place.

Members that share a name up to its first dot are one row: ``0001.jpg`` and ``0001.txt``
or ``0001.json``; several pictures are ``0001.0.jpg``, ``0001.1.jpg``.

Source: https://github.com/webdataset/webdataset, section "The WebDataset Format".
"""

from __future__ import annotations

import re
import sys
import tarfile
from pathlib import Path
from typing import Any, cast

import numpy as np

from mm1_mlx.errors import DataError
from mm1_mlx.train.data.example import Record
from mm1_mlx.train.data.lines import MAX_ROW_BYTES, parse_row

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "heic", "avif")
_BLOCK = 512
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}
# What tarfile lets through on damaged headers, beside its own errors.
_DAMAGE = (tarfile.TarError, OSError, ValueError, EOFError, OverflowError)


class Shard:
    """The rows of a tar file; only names, offsets and sizes are held.

    Raises:
        DataError: the file is compressed, damaged or cut off.
    """

    # Every row is read by itself.
    blocks = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self._keys: list[str] = []
        self._suffixes: list[str] = []
        firsts: list[int] = []
        members: list[tuple[int, int]] = []
        for name, start, size in _members(path):
            key, suffix = _cut(name)
            if not suffix or key.endswith("/") or key == "":
                continue  # A folder's own file, or one that macOS hides beside another.
            if not self._keys or key != self._keys[-1]:
                self._keys.append(key)
                firsts.append(len(members))
            members.append((start, size))
            # Few differ: one object for all that are alike.
            self._suffixes.append(sys.intern(suffix))
        self._firsts = np.array([*firsts, len(members)], np.int64)
        self._members = np.array(members, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Record:
        origin = f"{self.path}:{self._keys[index]}"
        files = self._files(index, origin)
        pictures = sorted(
            (s for s in files if s.rpartition(".")[2] in PICTURES), key=_natural
        )
        row: dict[str, Any] = {}
        if "json" in files:
            row = parse_row(files["json"], origin)
        if "txt" in files:
            try:
                row["caption" if pictures else "text"] = files["txt"].decode().strip()
            except UnicodeDecodeError:
                raise DataError(f"{origin}: its txt is not UTF-8") from None
        if not row:
            raise DataError(
                f"{origin}: holds {sorted(files)[:5]}, expected a txt or json beside "
                f"its pictures ({', '.join(PICTURES)})"
            )
        if pictures:
            row.pop("image", None)
            row["images"] = [files[suffix] for suffix in pictures]
        return Record(row, origin, self.path.parent)

    def _files(self, index: int, origin: str) -> dict[str, bytes]:
        """The row's members by their suffixes."""
        members = range(int(self._firsts[index]), int(self._firsts[index + 1]))
        total = int(self._members[members, 1].sum())
        if total > MAX_ROW_BYTES:
            raise DataError(
                f"{origin}: the row has {total} bytes, expected at most {MAX_ROW_BYTES}"
            )
        files = {}
        try:
            with self.path.open("rb") as file:
                for member in members:
                    start, size = self._members[member].tolist()
                    file.seek(start)
                    suffix = self._suffixes[member]
                    if suffix in files:
                        raise DataError(
                            f"{origin}: two members of the row end with {suffix!r:.40}; "
                            "give each an ending of its own"
                        )
                    data = files[suffix] = file.read(size)
                    if len(data) < size:
                        raise DataError(
                            f"{origin}: the file has been cut since the run began"
                        )
        except OSError as error:
            raise DataError(f"{origin}: cannot be read: {error.strerror}") from None
        return files


def _members(path: Path) -> list[tuple[str, int, int]]:
    """Name, offset and size of every regular file in a tar."""
    magic = b""
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(2)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                found = []
                end = -1
                while (member := tar.next()) is not None:
                    # A size below zero would lead back to an earlier one, for ever.
                    if member.size < 0 or tar.offset <= end:
                        raise DataError(
                            f"{path} is damaged at {member.name!r:.80}; get it again"
                        )
                    end = tar.offset
                    if member.isreg() and not member.issparse():
                        found.append((member.name, member.offset_data, member.size))
                    # It keeps them all otherwise, of a million rows a gigabyte.
                    cast(Any, tar).members.clear()
                end = tar.offset
            file.seek(end)
            # tarfile ends silently at a header that is none.
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise DataError(
                    f"{path} is damaged or cut off at byte {end}; get it again"
                )
    except _DAMAGE as error:
        if isinstance(error, DataError):
            raise
        if kind := _COMPRESSED.get(magic):
            raise DataError(
                f"{path} is compressed ({kind}), so its rows cannot be read one by one; "
                "unpack it to a plain tar"
            ) from None
        reason = getattr(error, "strerror", None) or str(error) or "damaged"
        raise DataError(f"{path} cannot be read as a tar file ({reason:.80})") from None
    for name, start, size in found:
        if start < 0 or start + size > total:
            raise DataError(f"{path} is cut off in {name!r:.80}; get it again")
    return found


def _cut(name: str) -> tuple[str, str]:
    """A member's name up to the first dot of its last part, and what stands behind."""
    folder, slash, file = name.rpartition("/")
    key, _, suffix = file.partition(".")
    return folder + slash + key, suffix.lower()


def _natural(suffix: str) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isdecimal() else (-1, part)
        for part in re.split(r"(\d+)", suffix)
    ]
