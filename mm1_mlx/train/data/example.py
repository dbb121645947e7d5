"""One row of a training file: as it was read, and as turns or a document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mm1_mlx.errors import DataError, MM1Error
from mm1_mlx.image import ImageSource
from mm1_mlx.messages import Part, Turn

Kind = Literal["conversation", "document"]


@dataclass(frozen=True)
class Record:
    """A row as its file has it."""

    values: Mapping[str, Any]
    # What errors call it: "file.jsonl:17".
    origin: str
    # Where its relative paths begin.
    folder: Path


@dataclass(frozen=True)
class Example:
    """What is learned from one row.

    Attributes:
        turns: of a conversation; of a document one, whose role is "document". None
            stands for a picture.
        images: the pictures in order, not decoded yet.
        origin: what errors call the row: "file.jsonl:17".
        kind: in a conversation the assistant's turns are learned, in a document all text.
        unlearned: which turns are not, though the assistant's; counted from 0.
    """

    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...]
    origin: str
    kind: Kind
    unlearned: frozenset[int] = frozenset()

    @property
    def parts(self) -> list[Part]:
        """The parts of all turns, in order: of a document, what it is."""
        return [part for _, parts in self.turns for part in parts]


@contextmanager
def located(origin: str) -> Iterator[None]:
    """Our own errors as a DataError that says which row it is."""
    try:
        yield
    except MM1Error as error:
        if isinstance(error, DataError) and str(error).startswith(origin):
            raise
        raise DataError(f"{origin}: {error}") from None
