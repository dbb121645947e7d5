"""A Hugging Face parquet file as rows by number."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm1_mlx.errors import DataError
from mm1_mlx.train.data.example import Record

# Row groups that are kept decoded: as many as an order mixes, and the next one.
KEPT_GROUPS = 5


class RowGroups:
    """The row groups of a data set's files that were used last."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[Path, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: tuple[Path, int], read: Callable[[], Any]) -> Any:
        """A group by its file and number, read if it is not held."""
        # One thread reads, the others wait: they mostly want the same group.
        with self._lock:
            if key not in self._held:
                self._held[key] = read()
                if len(self._held) > KEPT_GROUPS:
                    self._held.popitem(last=False)
            self._held.move_to_end(key)
            return self._held[key]


class Parquet:
    """The rows of a parquet file.

    A row group is read as a whole and kept for its other rows.

    Args:
        path: the file.
        groups: where the groups of all files of a data set are kept.

    Raises:
        DataError: the file is damaged, or pyarrow is not installed.
    """

    def __init__(self, path: Path, groups: RowGroups) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise DataError(
                f'{path} is a parquet file; pip install "mm1-mlx[parquet]" to read it'
            ) from None
        self.path = path
        self._reading = parquet
        self._faults = (pyarrow.ArrowException, OSError, ValueError, TypeError)
        try:
            metadata = parquet.read_metadata(path)
            count = metadata.num_row_groups
            sizes = [metadata.row_group(number).num_rows for number in range(count)]
            if min(sizes, default=0) < 0:
                raise ValueError("a row group has a negative number of rows")
        except self._faults as error:
            raise DataError(
                f"{path} cannot be read as a parquet file ({_reason(error)})"
            ) from None
        # Rows of every group: they are read together, so an order keeps them near.
        self.blocks: NDArray[np.int64] = np.array(sizes, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.blocks)])
        self._groups = groups

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Record:
        origin = f"{self.path}:{index + 1}"
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        table = self._groups.get((self.path, group), lambda: self._read(group, origin))
        try:
            row = table.slice(index - int(self._starts[group]), 1).to_pylist()[0]
        except (*self._faults, IndexError) as error:
            raise DataError(f"{origin}: cannot be read ({_reason(error)})") from None
        return Record(row, origin, self.path.parent)

    def _read(self, group: int, origin: str) -> Any:
        try:
            # Opened anew: one of very many shards would be kept open for nothing.
            with self._reading.ParquetFile(self.path) as file:
                return file.read_row_group(group)
        except self._faults as error:
            raise DataError(
                f"{origin}: row group {group} cannot be read ({_reason(error)}); get the "
                "file again"
            ) from None


def _reason(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(reason).splitlines()[0][:120]
