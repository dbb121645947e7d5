"""Several data sets by weight -> the example at any position.

``mixture[position]`` depends on the specs, the files, the seed and the position alone.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mm1_mlx.errors import ConfigError, DataError
from mm1_mlx.files import lies_in
from mm1_mlx.section import Section, require
from mm1_mlx.train.data.example import Example
from mm1_mlx.train.data.files import SUFFIXES, Files, find_files
from mm1_mlx.train.data.forms import FORMS, read_example
from mm1_mlx.train.data.order import GOLDEN, Order, Picks, scramble
from mm1_mlx.train.data.parquet import RowGroups
from mm1_mlx.train.data.pictures import PictureFolder

SPECS = Path(__file__).parent / "specs"
# Which rows of a data set: those that are learned, or those kept to measure by.
Part = Literal["train", "valid"]


@dataclass(frozen=True, kw_only=True)
class DatasetSpec(Section):
    """One data set of a mixture."""

    # A file, a folder of shards or a pattern, from the data's root; its suffix may be
    # left out.
    path: str
    # What it is called, its path if empty.
    name: str = ""
    # Its share beside the other weights; where none has one, its number of rows.
    weight: float | None = None
    # How its rows are to be read, None to recognise each by its keys.
    form: str | None = None
    # One of them stands behind every question, or asks for a caption.
    prompts: tuple[str, ...] = ()
    # Of a folder whose files are named by splits.
    split: str | None = None
    # Only so many rows, from the first.
    limit: int | None = None
    # Where relative pictures begin, from the data's root; None for beside the file.
    image_folder: str | None = None

    def __post_init__(self) -> None:
        require(self.path != "", "DatasetSpec.path is empty")
        require(
            self.weight is None or 0 < self.weight < math.inf,
            f"DatasetSpec.weight: {self.weight} is not a number above 0",
        )
        require(
            self.limit is None or self.limit >= 1,
            f"DatasetSpec.limit: {self.limit} is not above 0",
        )
        require(
            self.form is None or self.form in FORMS,
            f"DatasetSpec.form: {self.form!r} is not one of {list(FORMS)}",
        )

    @property
    def title(self) -> str:
        """What it is called."""
        return self.name or self.path


@dataclass(frozen=True, kw_only=True)
class MixtureSpec(Section):
    """A file of data sets that are learned together."""

    datasets: tuple[DatasetSpec, ...]
    # For who reads the file.
    about: str = ""

    def __post_init__(self) -> None:
        require(len(self.datasets) > 0, "MixtureSpec.datasets is empty")


class Dataset:
    """The examples of one data set in its order, epoch after epoch.

    Args:
        spec: what it is.
        paths: its files.
        key: of its order and of the choice of prompts.
        root: where ``image_folder`` begins.
        outside: whether pictures may lie outside their folder.
        held_out: share of the rows that are kept to measure by.
        part: which rows.
        groups: where row groups of parquet files are kept.

    Raises:
        DataError: a file cannot be read, or there are no rows.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        paths: Sequence[Path],
        key: int,
        root: Path,
        *,
        outside: bool = False,
        held_out: float = 0.0,
        part: Part = "train",
        groups: RowGroups | None = None,
    ) -> None:
        self.spec = spec
        self.files = Files(paths, groups)
        self._key = key
        self._folder = None if spec.image_folder is None else root / spec.image_folder
        self._outside = outside
        total = min(len(self.files), spec.limit or len(self.files))
        self._rows = choose_rows(total, held_out, part)
        blocks = self.files.blocks
        if blocks is not None:
            # How many of each block's rows are chosen.
            ends = np.searchsorted(self._rows, np.cumsum(blocks))
            blocks = np.diff(ends, prepend=0)
            blocks = blocks[blocks > 0]
        if not len(self._rows):
            share = f", of which {held_out:g} are held out" if held_out else ""
            raise DataError(
                f"{spec.title} has no rows to {'learn' if part == 'train' else 'keep'}: "
                f"{len(self.files)} in {len(self.files.paths)} files{share}"
            )
        self._order = Order(len(self._rows), key, blocks)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> int:
        """Which row of the files comes as the ``number``-th."""
        return int(self._rows[self._order[number]])

    def __getitem__(self, number: int) -> Example:
        """The example that comes as the ``number``-th.

        Raises:
            DataError: its row cannot be used.
        """
        record = self.files[self.row(number)]
        folder = PictureFolder(self._folder or record.folder, self._outside)
        prompts = self.spec.prompts
        prompt = (
            prompts[scramble(self._key, number) % len(prompts)] if prompts else None
        )
        return read_example(record, folder, self.spec.form, prompt)


def choose_rows(total: int, held_out: float, part: Part) -> NDArray[np.int64]:
    """Which of ``total`` rows are a part's, by a hash of their numbers.

    The hash (Fibonacci's: multiples of the golden ratio) falls evenly through the file,
    and does not depend on a seed: every run on the file holds out the same rows.
    """
    if held_out == 0.0 and part == "train":
        return np.arange(total)
    hashes = np.arange(total, dtype=np.uint64) * np.uint64(GOLDEN)
    held = hashes < np.uint64(round(held_out * 2**64))
    return np.flatnonzero(held if part == "valid" else ~held)


class Mixture:
    """The examples of several data sets, each as often as its weight says.

    Args:
        datasets: what is mixed.
        seed: of the mixture's order.
    """

    def __init__(self, datasets: Sequence[Dataset], seed: int) -> None:
        self.datasets = tuple(datasets)
        weights = [dataset.spec.weight for dataset in datasets]
        given = [weight for weight in weights if weight is not None]
        if given and len(given) < len(weights):
            lacking = [d.spec.title for d in datasets if d.spec.weight is None]
            raise DataError(
                f"{len(lacking)} of {len(weights)} data sets have no weight, e.g. "
                f"{lacking[:5]}; give every one a weight, or none"
            )
        self.weights = given or [float(len(dataset)) for dataset in datasets]
        self._picks = Picks(self.weights, seed)
        self._seed = seed

    def __len__(self) -> int:
        """Rows of all data sets together."""
        return sum(map(len, self.datasets))

    def __getitem__(self, position: int) -> Example:
        """The example at a position, counted from 0 without an end.

        Raises:
            DataError: its row cannot be used.
        """
        return self.substitute(position, 0)

    def substitute(self, position: int, attempt: int) -> Example:
        """What comes instead of a position's row: the next ones of its data set's order."""
        chosen, number = self._picks[position]
        return self.datasets[chosen][number + attempt]

    def row_at(self, position: int, attempt: int) -> tuple[int, int]:
        """Which data set's row that is, and which of its rows."""
        chosen, number = self._picks[position]
        return chosen, self.datasets[chosen].row(number + attempt)

    def dataset_at(self, position: int) -> Dataset:
        """The data set whose row stands at a position."""
        return self.datasets[self._picks[position][0]]

    def count(self, positions: int) -> list[int]:
        """How many of the first positions are each data set's."""
        return [
            self._picks.count(positions, chosen) for chosen in range(len(self.datasets))
        ]

    def identity(self) -> str:
        """A digest of all that decides which rows come and how they are read.

        Wherever the files lie; pictures in files of their own are not looked at.
        """
        parts: list[Any] = [self._seed]
        for dataset in self.datasets:
            spec = dataset.spec
            parts += [spec.weight, spec.form, spec.prompts, len(dataset)]
            parts.append(dataset.files.identity())
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def open_mixture(
    data: Sequence[str],
    *,
    root: Path | None = None,
    image_folder: Path | None = None,
    outside: bool = False,
    seed: int = 0,
    held_out: float = 0.0,
    part: Part = "train",
    measured: bool = False,
    groups: RowGroups | None = None,
) -> Mixture:
    """The mixture of what a user names.

    Args:
        data: files, folders, patterns, each with a weight behind a colon if it has one
            (``photos.jsonl:2``); mixtures in JSON; names of mixtures that come with the
            package (``specs/``).
        root: where relative paths begin; None for the current folder, and a mixture's own.
        image_folder: where the pictures begin of those that name no folder.
        outside: whether pictures may lie outside their folder, and what a mixture names
            outside its own.
        seed: of the order.
        held_out: share of the rows that are kept to measure by.
        part: which rows.
        measured: whether of folders of splits those are taken that measure.
        groups: where those of parquet files are kept; None for a place of their own.

    Raises:
        DataError: a file cannot be used; ConfigError: a mixture is not one.
    """
    if not data:
        raise DataError("no data is named; give files, folders or a mixture")
    specs: list[tuple[DatasetSpec, Path]] = []
    found: list[list[Path]] = []
    for name in data:
        for spec, base in _read_name(name, root):
            paths = _find(spec, base, measured=measured)
            if _is_mixture(name) and not outside:
                _check_inside(name, spec, base, paths)
            specs.append((spec, base))
            found.append(paths)
    lacking = [str(b / s.path) for (s, b), f in zip(specs, found, strict=True) if not f]
    if lacking:
        # A mixture's name comes before a folder's.
        hidden = [
            x for x in data if x in shipped_mixtures() and Path(root or "", x).exists()
        ]
        hint = f"; {hidden[0]} is a mixture, ./{hidden[0]} the folder" if hidden else ""
        raise DataError(
            f"{len(lacking)} of {len(specs)} data sets were not found, e.g. {lacking[:5]}"
            f"{hint}; put files ({', '.join(SUFFIXES)}) or folders of such names there, "
            "or write a mixture with their paths"
        )
    datasets = []
    groups = RowGroups(0) if groups is None else groups
    groups.serve(len(specs))
    for number, ((spec, base), paths) in enumerate(zip(specs, found, strict=True)):
        if image_folder is not None and spec.image_folder is None:
            spec = DatasetSpec.from_dict(
                spec.to_dict() | {"image_folder": str(image_folder.absolute())}
            )
        key = scramble(seed, number)
        datasets.append(
            Dataset(
                *(spec, paths, key, base),
                outside=outside,
                held_out=held_out,
                part=part,
                groups=groups,
            )
        )
    return Mixture(datasets, seed)


def shipped_mixtures() -> list[str]:
    """Names of the mixtures that come with the package."""
    return sorted(path.stem for path in SPECS.glob("*.json"))


def read_mixture(path: Path) -> MixtureSpec:
    """The mixture that a JSON file describes.

    Raises:
        ConfigError: it is none, or has a field that is unknown, missing or mistyped.
    """
    try:
        with path.open("rb") as file:
            # Rows as one list may be gigabytes.
            listed = file.read(64).lstrip().startswith(b"[")
        values = [] if listed else json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ConfigError(
            f"{path} is not valid JSON, expected a mixture of data sets; rows stand one "
            "a line in a .jsonl file"
        ) from None
    if isinstance(values, list):
        raise ConfigError(
            f"{path} is a list, expected a mixture of data sets; write a list's rows as "
            f"lines: jq -c '.[]' {path.name} > {path.stem}.jsonl"
        )
    try:
        return MixtureSpec.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _read_name(name: str, root: Path | None) -> list[tuple[DatasetSpec, Path]]:
    """The data sets that a name stands for, and where the path of each begins."""
    base = root or Path()
    if name in shipped_mixtures():
        spec = read_mixture(SPECS / f"{name}.json")
        return [(each, base) for each in spec.datasets]
    if _is_mixture(name):
        file = base / name
        spec = read_mixture(file)
        return [(each, root or file.parent) for each in spec.datasets]
    path, colon, weight = name.rpartition(":")
    if colon and not (base / name).exists():
        try:
            return [(DatasetSpec(path=path, weight=float(weight)), base)]
        except ValueError:
            raise DataError(
                f"{name!r} does not exist, nor is {weight!r} a weight above 0"
            ) from None
    return [(DatasetSpec(path=name), base)]


def _is_mixture(name: str) -> bool:
    return name.endswith(".json")


def _check_inside(name: str, spec: DatasetSpec, base: Path, paths: list[Path]) -> None:
    """Pass only if all that a mixture names lies in its folder.

    Data from elsewhere must not make the user's other files part of what is trained on.

    Raises:
        DataError: names what does not.
    """
    places = [(spec.path, path) for path in paths]
    if spec.image_folder is not None:
        places.append((spec.image_folder, base / spec.image_folder))
    for said, path in places:
        if not (lies_in(base, path) or path.resolve() == base.resolve()):
            raise DataError(
                f"{name}: {said!r:.80} lies outside {str(base)!r}; give a folder that "
                "holds it (--data-root), or trust the mixture (--outside)"
            )


def _find(spec: DatasetSpec, base: Path, *, measured: bool) -> list[Path]:
    """The files of a data set; none where nothing is of that name.

    Raises:
        ConfigError: a split is named of what has none.
    """
    path = base / spec.path
    if path.is_dir():
        return find_files(path, spec.split, measured=measured)
    beside = (path.with_name(path.name + suffix) for suffix in SUFFIXES)
    found = [] if path.exists() else [file for file in beside if file.is_file()][:1]
    if path.exists() or (not found and glob.has_magic(spec.path)):
        found = find_files(path)
    if found and spec.split:
        raise ConfigError(
            f"{found[0]}: the split {spec.split!r} is named of it, which is no folder of "
            "splits; leave the split out, or name the folder"
        )
    return found
