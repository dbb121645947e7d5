"""A folder into the pictures in it, by their names within it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from mm1_mlx.errors import DataError

# Of the formats that image.py reads.
SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".heic", ".heif", ".avif"}
)


@dataclass(frozen=True)
class Pictures:
    """The pictures of a folder.

    Attributes:
        folder: where they are.
        names: those to be captioned, by their paths within it, ``/`` between folders.
        everything: all that are there.
        unread: folders in it that cannot be read, and why.
    """

    folder: Path
    names: tuple[str, ...]
    everything: tuple[str, ...]
    unread: tuple[str, ...] = ()

    def sidecars(self, suffix: str) -> dict[str, Path]:
        """The file beside each picture that is its own: ``a.txt`` of ``a.png``.

        Where several pictures would share one, each keeps its suffix: ``a.png.txt``. It
        depends on all pictures that are there, so that it is the same for any choice.
        """
        # As disks see names that do not tell capitals apart.
        stems = Counter(_stem(name) for name in self.everything)
        whole = {name.casefold() for name in self.everything}

        def own(name: str) -> Path:
            path, stem = self.folder / name, _stem(name)
            if stems[stem] == 1 and stem not in whole:
                return path.with_suffix(suffix)
            return path.with_name(path.name + suffix)

        return {name: own(name) for name in self.names}


def find_pictures(
    folder: Path, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Pictures:
    """The pictures in a folder and those in it, in the order of their names.

    Hidden files and folders are passed over, and each folder is read once, however many
    links lead to it.

    Args:
        folder: where to look.
        include: patterns, one of which a picture's name, or path within the folder, must
            match; ``*`` stands for any letters, ``/`` too. None for all.
        exclude: patterns, none of which may.

    Raises:
        DataError: it is no folder, or there are none.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {found}; give a folder of pictures")
    unread: list[str] = []
    everything = tuple(_walk(folder, "", unread, set()))
    names = tuple(
        name for name in everything
        if (not include or _matches(name, include)) and not _matches(name, exclude)
    )  # fmt: skip
    if not names:
        kinds = f"expected {', '.join(sorted(SUFFIXES))}"
        left = f"{len(everything):,} others match no --include, or an --exclude"
        raise DataError(f"{folder} holds no pictures, {left if everything else kinds}")
    return Pictures(folder, names, everything, tuple(unread))


def _walk(folder: Path, inner: str, unread: list[str], seen: set[Any]) -> Iterator[str]:
    """The names of pictures in a folder ``inner`` of one; what it cannot read is told."""
    try:
        status = (folder / inner).stat()
        known = (status.st_dev, status.st_ino)
        if known in seen:
            return
        seen.add(known)
        with os.scandir(folder / inner) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        unread.append(f"{folder / inner}: {error.strerror or error}")
        return
    for entry in found:
        name = f"{inner}/{entry.name}" if inner else entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(folder, name, unread, seen)
        # A link that leads nowhere is a picture that cannot be read: that has its row.
        elif PurePosixPath(name).suffix.lower() in SUFFIXES:
            yield name


def _matches(name: str, patterns: Sequence[str]) -> bool:
    last = PurePosixPath(name).name
    return any(fnmatch(name, one) or fnmatch(last, one) for one in patterns)


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix().casefold()
