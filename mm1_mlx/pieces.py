"""A tensor of a safetensors file, read a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import numpy as np

from mm1_mlx.errors import CheckpointError
from mm1_mlx.files import KINDS, read_header
from mm1_mlx.shard import Deferred

ALL = slice(None)
# What is held at a time of a tensor that stays as it is.
PIECE_BYTES = 16_000_000


class Readable(Protocol):
    """A tensor that is read when it is asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> mx.Dtype:
        """Its type."""

    def read(self, rows: slice = ALL) -> mx.array:
        """Its values, or those of some places along the first axis."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a shard: what the header says of it, and its values when asked for."""

    path: Path
    shape: tuple[int, ...]
    dtype: mx.Dtype
    # Where in the file its bytes begin.
    start: int

    def read(self, rows: slice = ALL) -> mx.array:
        """Its values, or those of some places along the first axis; the rest stay unread.

        Raises:
            CheckpointError: the file is no longer what it was.
        """
        shape, first = self.shape, 0
        if shape:
            first, end, _ = rows.indices(shape[0])
            shape = (max(end - first, 0), *shape[1:])
        width = prod(self.shape[1:]) * self.dtype.size
        count = prod(shape) * self.dtype.size
        try:
            data = np.fromfile(
                self.path, np.uint8, count, offset=self.start + first * width
            )
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read ({error})") from None
        if data.size != count:
            raise CheckpointError(
                f"{self.path} became shorter while it was read; get it again"
            )
        return mx.array(data).view(self.dtype).reshape(shape)

    def deferred(self) -> Deferred:
        """The tensor as it is, read when it is written."""
        return Deferred(self.shape, self.dtype, lambda: read_in_pieces(self))


def tensors_of(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name, from its header.

    Raises:
        CheckpointError: it is missing or damaged, or holds what mlx has no type for.
    """
    tensors = {}
    for name, entry in read_header(path).items():
        if entry.kind not in KINDS:
            raise CheckpointError(
                f"{path} cannot be read: tensor {name!r} is of the unsupported dtype "
                f"{entry.kind}"
            )
        tensors[name] = TensorInfo(path, entry.shape, KINDS[entry.kind], entry.start)
    return tensors


def read_in_pieces(tensor: Readable) -> Iterator[mx.array]:
    """The tensor's values in order, a few rows at a time."""
    for rows in row_blocks(tensor.shape, tensor.dtype.size):
        yield tensor.read(rows)


def row_blocks(shape: tuple[int, ...], itemsize: int = 4) -> Iterator[slice]:
    """Places along a tensor's first axis, a few of so many bytes at a time."""
    if not shape:
        yield ALL
        return
    width = prod(shape[1:]) * itemsize
    count = max(PIECE_BYTES // max(width, 1), 1)
    for start in range(0, shape[0], count):
        yield slice(start, start + count)
