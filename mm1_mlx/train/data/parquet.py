"""A Hugging Face parquet file as rows by number."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm1_mlx.errors import DataError
from mm1_mlx.train.data.example import Record

# Row groups that are kept decoded: as many as an order mixes, and the next one.
KEPT_GROUPS = 5


class Parquet:
    """The rows of a parquet file.

    A row group is read as a whole and kept for its other rows.

    Raises:
        DataError: the file is damaged, or pyarrow is not installed.
    """

    def __init__(self, path: Path) -> None:
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
            groups = range(metadata.num_row_groups)
            sizes = [metadata.row_group(group).num_rows for group in groups]
        except self._faults as error:
            raise DataError(
                f"{path} cannot be read as a parquet file ({_reason(error)})"
            ) from None
        # Rows of every group: they are read together, so an order keeps them near.
        self.blocks: NDArray[np.int64] = np.array(sizes, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.blocks)])
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Record:
        origin = f"{self.path}:{index + 1}"
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        table = self._group(group, origin)
        try:
            row = table.slice(index - int(self._starts[group]), 1).to_pylist()[0]
        except (*self._faults, IndexError) as error:
            raise DataError(f"{origin}: cannot be read ({_reason(error)})") from None
        return Record(row, origin, self.path.parent)

    def _group(self, number: int, origin: str) -> Any:
        # One thread reads, the others wait: they mostly want the same group.
        with self._lock:
            if number not in self._groups:
                try:
                    # Opened anew: a file that is kept open by every shard is one too many.
                    with self._reading.ParquetFile(self.path) as file:
                        table = file.read_row_group(number)
                except self._faults as error:
                    raise DataError(
                        f"{origin}: row group {number} cannot be read "
                        f"({_reason(error)}); get the file again"
                    ) from None
                self._groups[number] = table
                if len(self._groups) > KEPT_GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(number)
            return self._groups[number]


def _reason(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(reason).splitlines()[0][:120]
