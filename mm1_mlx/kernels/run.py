"""Keys and values as a cache holds them, without a copy: where, how many, which rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

# mlx packs a matrix as codes, scales and biases.
Packed = tuple[mx.array, mx.array, mx.array]


@dataclass(frozen=True)
class Run:
    """The keys and values of neighbouring positions, in buffers with room for more.

    Attributes:
        keys: [B, Hkv, C, D] with room for C positions, or that packed along D.
        values: the same of the values. B is 1 where a batch shares the run.
        length: positions in use, the first ``length`` of C.
        starts: [B], every row's first position that is no padding; None: all 0.
        bits: of a packed number; 0 where keys and values are plain.
        group_size: numbers that share a scale and a bias.
    """

    keys: mx.array | Packed
    values: mx.array | Packed
    length: int
    starts: mx.array | None = None
    bits: int = 0
    group_size: int = 0

    @property
    def planes(self) -> tuple[Packed, Packed]:
        """The arrays that keys and values are made of; a plain one thrice."""
        return _planes(self.keys), _planes(self.values)

    @property
    def rows(self) -> int:
        """B, 1 where a batch shares the run."""
        return self.planes[0][0].shape[0]

    @property
    def num_kv_heads(self) -> int:
        """Hkv."""
        return self.planes[0][0].shape[1]

    @property
    def capacity(self) -> int:
        """C, the positions that the buffers have room for."""
        return self.planes[0][0].shape[2]

    @property
    def dtype(self) -> mx.Dtype:
        """The precision of plain numbers, or of scales and biases."""
        return self.planes[0][1].dtype

    def used(self, side: mx.array | Packed) -> mx.array | Packed:
        """The positions in use of ``keys`` or ``values``."""
        if isinstance(side, mx.array):
            return side[:, :, : self.length]
        codes, scales, biases = (plane[:, :, : self.length] for plane in side)
        return codes, scales, biases

    def unpacked(self, side: mx.array | Packed, dtype: mx.Dtype) -> mx.array:
        """The positions in use of ``keys`` or ``values``, [B, Hkv, N, D], as numbers."""
        used = self.used(side)
        if isinstance(used, mx.array):
            return used.astype(dtype)
        codes, scales, biases = used
        return mx.dequantize(
            codes,
            scales.astype(dtype),
            biases.astype(dtype),
            group_size=self.group_size,
            bits=self.bits,
        )


def _planes(side: mx.array | Packed) -> Packed:
    return (side, side, side) if isinstance(side, mx.array) else side


def runs_of(cache: Any) -> list[Run]:
    """What a cache holds, oldest first; mlx-lm's caches of keys and values, and ours."""
    tell: Callable[[], list[Run]] | None = getattr(cache, "runs", None)
    if tell is not None:
        return tell()
    starts = getattr(cache, "left_padding", None)
    length = cache.offset if starts is None else cache.size()
    return [
        Run(
            cache.keys,
            cache.values,
            length,
            starts,
            getattr(cache, "bits", 0),
            getattr(cache, "group_size", 0),
        )
    ]
