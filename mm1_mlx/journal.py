"""A file of JSON lines that grows line by line, and outlives a run that is killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mm1_mlx.errors import DataError


class Journal:
    """Appends lines to a file, each whole before the next.

    Args:
        path: the file, made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Without a buffer: what a full disk refuses is not tried again on closing.
        self.file = path.open("ab", buffering=0)

    def read(self) -> list[bytes]:
        """The lines so far; one that was cut off is taken away."""
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self.file.truncate(len(whole))
        return whole.splitlines()

    def add(self, line: dict[str, Any]) -> None:
        """Write a line.

        Raises:
            DataError: there is no room for it.
        """
        left = encoded(line)
        with written(self.path):
            while left:
                left = left[self.file.write(left) :]

    def close(self) -> None:
        """Let the file go."""
        self.file.close()


def encoded(value: Any) -> bytes:
    """A value as one JSON line; a name that is not UTF-8 is escaped, and comes back."""
    try:
        return (json.dumps(value, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(value) + "\n").encode()


@contextmanager
def written(path: Path) -> Iterator[None]:
    """The system's errors as one that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}; make room and give the "
            "same command, and the run goes on"
        ) from None
