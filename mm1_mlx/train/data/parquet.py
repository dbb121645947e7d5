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
from mm1_mlx.room import unswapped
from mm1_mlx.train.data.example import Record
from mm1_mlx.train.data.lines import MAX_ROW_BYTES

# Row groups that are kept decoded: as many as a data set's order mixes, and the next one.
KEPT_GROUPS = 5
# And of all data sets of a run together, in bytes, and as a share of the memory that is
# free. Where what is mixed is larger than that, groups are read again and again: slow,
# where else memory would be gone.
KEPT_BYTES, KEPT_SHARE = 2 << 30, 1 / 8
# Of one of them; a file of a few bytes may stand for any number.
MAX_GROUP_BYTES = 1 << 30
# Rows that are decoded before their bytes are counted.
_TOGETHER = 1000
# How a column's values are written once and named by their numbers.
_FOLDED = {"PLAIN_DICTIONARY", "RLE_DICTIONARY"}
# What Python keeps of a value beside its bytes, about.
_OBJECT_BYTES = 64


class RowGroups:
    """The row groups that were used last.

    Args:
        sets: how many data sets they are of.

    Attributes:
        limit: how many bytes are kept at most, but for one group.
        stated: bytes of all groups of each file, as it says.
    """

    def __init__(self, sets: int = 1) -> None:
        self._most = KEPT_GROUPS * sets
        self._held: OrderedDict[tuple[Path, int], Any] = OrderedDict()
        self._lock = threading.Lock()
        room = unswapped()
        self.limit = (
            KEPT_BYTES if room is None else min(KEPT_BYTES, int(KEPT_SHARE * room))
        )
        self.stated: dict[Path, int] = {}

    def serve(self, sets: int) -> None:
        """Keep those of so many data sets more."""
        self._most += KEPT_GROUPS * sets

    @property
    def expected(self) -> int:
        """How many bytes will be held."""
        return min(self.limit, sum(self.stated.values()))

    def __len__(self) -> int:
        return len(self._held)

    @property
    def nbytes(self) -> int:
        """How many bytes are held."""
        return sum(group.nbytes for group in self._held.values())

    def get(self, key: tuple[Path, int], read: Callable[[], Any]) -> Any:
        """A group by its file and number, read if it is not held."""
        # One thread reads, the others wait: they mostly want the same group.
        with self._lock:
            if key not in self._held:
                self._held[key] = read()
                while len(self._held) > self._most or (
                    self.nbytes > self.limit and len(self._held) > 1
                ):
                    self._held.popitem(last=False)
            self._held.move_to_end(key)
            return self._held[key]


class Parquet:
    """The rows of a parquet file.

    A row group is read as a whole and kept for its other rows, texts that repeat once.

    Args:
        path: the file.
        groups: where the groups of all files of a mixture are kept.

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
        self._reading, self._joined = parquet, pyarrow.Table.from_batches
        self._faults = (pyarrow.ArrowException, OSError, ValueError, TypeError)
        try:
            metadata = parquet.read_metadata(path)
            count = metadata.num_row_groups
            found = [metadata.row_group(number) for number in range(count)]
            sizes = [group.num_rows for group in found]
            groups.stated[path] = sum(max(0, x.total_byte_size) for x in found)
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
            rows = table.slice(index - int(self._starts[group]), 1)
            size = sum(_unfolded(x) for column in rows.columns for x in column.chunks)
            if size > MAX_ROW_BYTES:
                raise DataError(
                    f"{origin}: the row has {size} bytes, expected at most {MAX_ROW_BYTES}"
                )
            row = rows.to_pylist()[0]
        except DataError:
            raise
        except (*self._faults, IndexError) as error:
            raise DataError(f"{origin}: cannot be read ({_reason(error)})") from None
        return Record(row, origin, self.path.parent)

    def _check_size(self, size: int, group: int, origin: str) -> None:
        if size > MAX_GROUP_BYTES:
            raise DataError(
                f"{origin}: row group {group} has more than {MAX_GROUP_BYTES / 1e9:.2g} GB; "
                "write the file again with fewer rows a group (row_group_size=100)"
            )

    def _read(self, group: int, origin: str) -> Any:
        try:
            found = self._reading.read_metadata(self.path).row_group(group)
            columns = [found.column(i) for i in range(found.num_columns)]
            # What lies packed, and eight bytes for each number.
            stated = found.total_byte_size, 8 * sum(x.num_values for x in columns)
            self._check_size(max(stated), group, origin)
            folded = [
                x.path_in_schema
                for x in columns
                if x.physical_type == "BYTE_ARRAY" and _FOLDED & set(x.encodings)
            ]
            # Opened anew: one of very many shards would be kept open for nothing.
            with self._reading.ParquetFile(self.path, read_dictionary=folded) as file:
                batches, total = [], 0
                for batch in file.iter_batches(_TOGETHER, row_groups=[group]):
                    total += batch.nbytes
                    self._check_size(total, group, origin)
                    batches.append(batch)
                return self._joined(batches, file.schema_arrow)
        except DataError:
            raise
        except self._faults as error:
            raise DataError(
                f"{origin}: row group {group} cannot be read ({_reason(error)}); get the "
                "file again"
            ) from None


def _unfolded(values: Any) -> int:
    """How many bytes an array of Arrow's takes where each of its values is by itself.

    A text that repeats is held once, and a list of such texts unfolds without bound.
    """
    from pyarrow import compute, types

    kind, total = values.type, _OBJECT_BYTES * len(values)
    if types.is_struct(kind):
        return total + sum(map(_unfolded, values.flatten()))
    if types.is_map(kind):
        # Unlike a list's, its values are not cut to those of a slice.
        first, last = (values.offsets[i].as_py() for i in (0, -1))
        sides = (values.keys, values.items)
        return total + sum(_unfolded(x.slice(first, last - first)) for x in sides)
    if types.is_nested(kind):
        return total + _unfolded(values.flatten())
    if types.is_string_view(kind) or types.is_binary_view(kind):
        # A view is of 16 bytes, its length first; ``nbytes`` is that of all rows' texts.
        lengths = np.frombuffer(values.buffers()[1], np.int32)[4 * values.offset :: 4]
        return total + int(lengths[: len(values)].sum(dtype=np.int64))
    if not types.is_dictionary(kind):
        return total + values.nbytes
    seen = values.indices.value_counts()
    texts = values.dictionary.take(seen.field("values"))
    lengths = compute.multiply(compute.binary_length(texts), seen.field("counts"))
    return total + (compute.sum(lengths).as_py() or 0)


def _reason(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(reason).splitlines()[0][:120]
