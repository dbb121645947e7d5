"""A path, a folder of shards or a pattern -> the rows of its files, by number."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mm1_mlx.errors import DataError
from mm1_mlx.train.data.example import Record
from mm1_mlx.train.data.lines import JsonLines
from mm1_mlx.train.data.parquet import Parquet, RowGroups
from mm1_mlx.train.data.shards import Shard

# Bytes at either end of a file that tell it from others.
_SAMPLE = 1 << 16


class Source(Protocol):
    """Rows by number, from any thread.

    Attributes:
        blocks: how many rows in a row are read together; None where each is by itself.
    """

    @property
    def blocks(self) -> NDArray[np.int64] | None:
        """Sizes of the blocks."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...


SUFFIXES = (".jsonl", ".ndjson", ".tar", ".parquet")
# How files are named that are not learned from unless that is asked; those to measure by
# come first.
_OTHER_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")
# Rows of a block beside such as are read by blocks.
_TOGETHER = 1000
_WAYS_OUT = {
    ".json": "write one row a line: jq -c '.[]' FILE.json > FILE.jsonl",
    ".gz": "unpack it first",
    ".tgz": "unpack it to a plain tar",
    ".csv": "convert it to parquet or JSONL first",
    ".arrow": "convert it to parquet first",
}


class Files:
    """The rows of several files, one behind another.

    Args:
        paths: the files.
        groups: where those of parquet files are kept; None for a place of their own.
    """

    def __init__(self, paths: Sequence[Path], groups: RowGroups | None = None) -> None:
        self.paths = tuple(paths)
        groups = RowGroups() if groups is None else groups
        self._sources = [_open(path, groups) for path in paths]
        lengths = [len(source) for source in self._sources]
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.blocks = _blocks(self._sources)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Record:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sources[number][index - int(self._starts[number])]

    def identity(self) -> str:
        """A digest of every file's name, size, number of rows and content.

        Of tar and parquet files, which are not read as a whole, of both their ends.
        """
        digest = hashlib.sha256()
        for path, source in zip(self.paths, self._sources, strict=True):
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0{len(source)}\0".encode())
            if isinstance(source, JsonLines):
                digest.update(source.digest)
                continue
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLE))
                file.seek(max(0, size - _SAMPLE))
                digest.update(file.read(_SAMPLE))
        return digest.hexdigest()


def _open(path: Path, groups: RowGroups) -> Source:
    match path.suffix.lower():
        case ".tar":
            return Shard(path)
        case ".parquet":
            return Parquet(path, groups)
    return JsonLines(path)


def _blocks(sources: Sequence[Source]) -> NDArray[np.int64] | None:
    """The blocks of several sources; None where every row is read by itself."""
    if all(source.blocks is None for source in sources):
        return None
    found = []
    for source in sources:
        sizes = source.blocks
        if sizes is None:
            whole, rest = divmod(len(source), _TOGETHER)
            sizes = np.array([_TOGETHER] * whole + [rest] * (rest > 0), np.int64)
        found.append(sizes)
    return np.concatenate(found)


def find_files(
    path: Path, split: str | None = None, *, measured: bool = False
) -> list[Path]:
    """The data files that a path stands for, in the order of their names.

    A folder is one of shards, or as Hugging Face lays data sets out: files in it or in
    its ``data/``, named by their split (``train-00000-of-00008.parquet``).

    Args:
        path: a file, a folder, or a pattern with ``*``.
        split: only files of this split; None for all but those of validation and test.
        measured: whether None stands for one of those, if there are any.

    Raises:
        DataError: there are none, or a file is of a kind that is not read.
    """
    if path.is_dir():
        return _of_split(path, split, measured=measured)
    if path.is_file():
        _check_kind(path)
        return [path]
    try:
        found = sorted(
            file
            for file in Path(path.anchor).glob(str(path.relative_to(path.anchor)))
            if not file.is_dir()
        )
    except ValueError:
        found = []  # No pattern that pathlib knows.
    for file in found:
        _check_kind(file)
    if found:
        return found
    raise DataError(f"{path} does not exist; give a file, a folder or a pattern")


def _of_split(folder: Path, split: str | None, *, measured: bool) -> list[Path]:
    found = sorted(
        path
        for inner in (folder, folder / "data")
        if inner.is_dir()
        for path in inner.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    if not found:
        raise DataError(
            f"{folder} holds no data files, expected {', '.join(SUFFIXES)} in it or in "
            "its data/"
        )
    if split is None and measured:
        named = (s for s in _OTHER_SPLITS if any(_is_of(path, s) for path in found))
        split = next(named, None)
    if split is None:
        others = {p for p in found for other in _OTHER_SPLITS if _is_of(p, other)}
        chosen = [path for path in found if path not in others]
    else:
        chosen = [path for path in found if _is_of(path, split)]
    if not chosen:
        raise DataError(
            f"{folder} holds no split {split or 'train'!r}, its files are "
            f"{[path.name for path in found[:5]]}; name another in a mixture"
        )
    return chosen


def _is_of(path: Path, split: str) -> bool:
    """Whether a file is named by a split: "train.jsonl", "train-00000-of-00008.parquet"."""
    return path.stem == split or path.stem.startswith((f"{split}-", f"{split}_"))


def _check_kind(path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        way_out = _WAYS_OUT.get(suffix, "convert it to one of them")
        raise DataError(
            f"{path} is none of {', '.join(SUFFIXES)}, which are read; {way_out}"
        )
