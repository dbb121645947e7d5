"""Key-value caches of 8 or 4 bits a number, for one sequence and for a batch.

mlx-lm's cache of one sequence, made such that ``merge`` gives a batch of packed keys, so
that mlx-lm's BatchGenerator serves it; mlx-lm has none. ``kernels.attend`` reads both
where they lie.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm

from mm1_mlx.kernels.run import Packed, Run


class KVCache(mlx_lm.KVCache):
    """mlx-lm's, whose packed form can be batched.

    It and the next keep mlx-lm's names, by which mlx-lm saves and loads caches.
    """

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> QuantizedKVCache:
        """What it holds, packed."""
        return QuantizedKVCache.of(super().to_quantized(group_size, bits))


class QuantizedKVCache(mlx_lm.QuantizedKVCache):
    """mlx-lm's, which can be batched."""

    @classmethod
    def of(cls, cache: Any) -> QuantizedKVCache:
        """The same keys and values as those of mlx-lm's own class."""
        made = cls(cache.group_size, cache.bits)
        made.keys, made.values, made.offset = cache.keys, cache.values, cache.offset
        return made

    def size(self) -> int:
        """Positions held."""
        return self.offset

    @classmethod
    def merge(cls, caches: list[QuantizedKVCache]) -> BatchQuantizedKVCache:
        """A batch of what the caches hold, one row each."""
        return BatchQuantizedKVCache.merge(caches)


class BatchQuantizedKVCache:
    """Packed keys and values of a batch, shorter rows padded at their left.

    mlx-lm's BatchKVCache thrice: it pads, rolls, cuts and joins whatever lies along the
    positions, here the codes, the scales and the biases.
    """

    def __init__(
        self, left_padding: list[int], group_size: int = 64, bits: int = 8
    ) -> None:
        self.group_size = group_size
        self.bits = bits
        self.planes = [mlx_lm.BatchKVCache(left_padding) for _ in range(3)]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Append keys and values [B, Hkv, T, D]; all that are held, packed."""
        packed = zip(self.planes, self._pack(keys), self._pack(values), strict=True)
        held = [plane.update_and_fetch(k, v) for plane, k, v in packed]
        for plane in self.planes[1:]:
            # One array: sums that nobody reads would be a graph that only grows.
            plane.offset = self.offset
        keys_held, values_held = zip(*held, strict=True)
        return keys_held, values_held

    def _pack(self, x: mx.array) -> Packed:
        codes, scales, biases = mx.quantize(x, self.group_size, self.bits)
        return codes, scales, biases

    def runs(self) -> list[Run]:
        """What it holds, for ``kernels.attend``."""
        return [
            Run(
                self.keys,
                self.values,
                self.size(),
                self.left_padding,
                self.bits,
                self.group_size,
            )
        ]

    @property
    def keys(self) -> Packed:
        """Codes, scales and biases with room for more positions, [B, Hkv, C, ...]."""
        codes, scales, biases = (plane.keys for plane in self.planes)
        return codes, scales, biases

    @property
    def values(self) -> Packed:
        """The same of the values."""
        codes, scales, biases = (plane.values for plane in self.planes)
        return codes, scales, biases

    @property
    def offset(self) -> mx.array:
        """Every row's number of tokens, [B]; negative while its padding comes."""
        return self.planes[0].offset

    @property
    def left_padding(self) -> mx.array:
        """Every row's positions of padding, [B]."""
        return self.planes[0].left_padding

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The mask of N queries; ``runs`` says where padding is."""
        if return_array or window_size is not None:
            return self.planes[0].make_mask(N, window_size=window_size)
        return "causal" if N > 1 else None

    def prepare(self, **options: Any) -> None:
        """Announce the padding of the rows to come."""
        for plane in self.planes:
            plane.prepare(**options)

    def finalize(self) -> None:
        """Move the padding that came at the right of rows to their left."""
        for plane in self.planes:
            plane.finalize()

    def filter(self, batch_indices: list[int]) -> None:
        """Keep only some rows."""
        for plane in self.planes:
            plane.filter(batch_indices)

    def extend(self, other: BatchQuantizedKVCache) -> None:
        """Take over another batch's rows, packed alike."""
        _check_alike([self, other])
        for plane, more in zip(self.planes, other.planes, strict=True):
            plane.extend(more)

    def extract(self, idx: int) -> QuantizedKVCache:
        """One row, without its padding."""
        made = QuantizedKVCache(self.group_size, self.bits)
        rows = [plane.extract(idx) for plane in self.planes]
        made.keys = tuple(row.keys for row in rows)
        made.values = tuple(row.values for row in rows)
        made.offset = rows[0].offset
        return made

    @classmethod
    def merge(cls, caches: list[QuantizedKVCache]) -> BatchQuantizedKVCache:
        """A batch of what the caches hold, one row each, packed alike."""
        _check_alike(caches)
        made = cls([0] * len(caches), caches[0].group_size, caches[0].bits)
        made.planes = [
            mlx_lm.BatchKVCache.merge([_plane(cache, i) for cache in caches])
            for i in range(3)
        ]
        return made

    @property
    def state(self) -> Any:
        """What ``from_state`` makes the same cache of."""
        return [plane.state for plane in self.planes], self.group_size, self.bits

    @classmethod
    def from_state(cls, state: Any) -> BatchQuantizedKVCache:
        """The cache that had this state."""
        planes, group_size, bits = state
        made = cls([], group_size, bits)
        made.planes = [mlx_lm.BatchKVCache.from_state(plane) for plane in planes]
        return made

    def is_trimmable(self) -> bool:
        """Whether the newest positions can be dropped: yes."""
        return True

    def trim(self, n: int) -> int:
        """Drop the newest n positions of every row; how many there were."""
        trimmed = [plane.trim(n) for plane in self.planes]
        return trimmed[0]

    def size(self) -> int:
        """Positions held, padding included."""
        return self.planes[0].size()

    def empty(self) -> bool:
        """Whether it never held anything."""
        return self.planes[0].empty()

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(plane.nbytes for plane in self.planes)


def _plane(cache: QuantizedKVCache, i: int) -> mlx_lm.KVCache:
    """The codes, scales or biases of a cache, as if they were keys and values."""
    plane = mlx_lm.KVCache()
    if cache.keys is not None:
        plane.keys, plane.values = cache.keys[i], cache.values[i]
        plane.offset = cache.offset
    return plane


def _check_alike(caches: list[Any]) -> None:
    kinds = {(cache.bits, cache.group_size) for cache in caches}
    if len(kinds) > 1:
        raise ValueError(f"rows of one batch are packed alike, not {sorted(kinds)}")
