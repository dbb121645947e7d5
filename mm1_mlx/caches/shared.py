"""One prefix that every row of a batch shares: kept once, and read once a step.

Eight questions after the same eight shots have the shots' keys and values in common;
only what comes after is each row's own. ``kernels.attend`` attends over the prefix with
all rows' queries at once and merges that with attention over each row's own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mm1_mlx.caches.quantized import KVCache, QuantizedKVCache
from mm1_mlx.kernels.run import Run, runs_of


def share(prefix: Sequence[Any], rows: int) -> list[list[SharedPrefixKVCache]]:
    """Caches for so many continuations of one prefill, for ``BatchGenerator.insert``.

    Args:
        prefix: one sequence's caches, plain or packed, one a layer. They may go on
            being used: what they hold now is what is shared.
        rows: continuations; their caches may be used alone, too.
    """
    layers = [Prefix(cache) for cache in prefix]
    return [[SharedPrefixKVCache(layer) for layer in layers] for _ in range(rows)]


class Prefix:
    """What one layer's cache of a sequence holds now."""

    def __init__(self, cache: Any) -> None:
        # Its own references: in mlx an array's name may be written into.
        cache = copy.copy(cache)
        cache.keys, cache.values = (_held(x) for x in (cache.keys, cache.values))
        self.cache = cache
        self.runs: list[Run] = runs_of(cache) if cache.keys is not None else []

    def __deepcopy__(self, memo: dict[int, Any]) -> Prefix:
        # Nothing in it changes, and copies of a batch must go on sharing it.
        return self

    @property
    def length(self) -> int:
        """Positions."""
        return int(self.cache.offset)

    def suffix(self) -> Any:
        """An empty cache for what follows, as precise."""
        if hasattr(self.cache, "bits"):
            return QuantizedKVCache(self.cache.group_size, self.cache.bits)
        return KVCache()


class SharedPrefixKVCache:
    """The cache of one sequence, or of a batch, that begins with a shared prefix.

    In mlx-lm's protocol of caches: ``merge`` makes the batch of single ones. Rows with
    different prefixes are given ordinary ones when they meet in a batch.

    Args:
        prefix: what is shared; None where nothing is any more.
        suffix: a cache of what follows, of one sequence or of a batch.
    """

    def __init__(self, prefix: Prefix | None, suffix: Any = None) -> None:
        self.prefix = prefix
        if suffix is None:
            suffix = prefix.suffix() if prefix else KVCache()
        self.suffix = suffix

    @property
    def offset(self) -> Any:
        """Tokens before the next: an int, or [B] of a batch."""
        return self._shared + self.suffix.offset

    @property
    def _shared(self) -> int:
        return self.prefix.length if self.prefix else 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Append keys and values [B, Hkv, T, D]; those of the suffix."""
        return self.suffix.update_and_fetch(keys, values)

    def runs(self) -> list[Run]:
        """What it holds, for ``kernels.attend``: the prefix, then the rest."""
        return [*(self.prefix.runs if self.prefix else []), *runs_of(self.suffix)]

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The mask of N queries; ``runs`` says where padding is."""
        if not return_array and window_size is None:
            return "causal" if N > 1 else None
        P, S = self._shared, self.suffix.size() + N
        # Padding stands between the prefix and a row's own: places are not positions.
        padding = mx.array(getattr(self.suffix, "left_padding", 0)).reshape(-1, 1)
        own = P + mx.arange(S) - padding  # [B, S]
        before = mx.broadcast_to(mx.arange(P), (own.shape[0], P))
        keys = mx.concatenate([before, own], axis=1)[:, None, None, :]
        queries = own[:, None, -N:, None]
        seen = keys <= queries
        return seen if window_size is None else seen & (keys > queries - window_size)

    def prepare(self, **options: Any) -> None:
        """Announce the padding of the rows to come."""
        self.suffix.prepare(**options)

    def finalize(self) -> None:
        """Move the padding that came at the right of rows to their left."""
        self.suffix.finalize()

    def filter(self, batch_indices: list[int]) -> None:
        """Keep only some rows."""
        self.suffix.filter(batch_indices)

    def extend(self, other: SharedPrefixKVCache) -> None:
        """Take over another batch's rows."""
        if other.prefix is not self.prefix:
            self._unshare()
            other._unshare()
        self.suffix.extend(other.suffix)

    def extract(self, idx: int) -> SharedPrefixKVCache:
        """One row."""
        return SharedPrefixKVCache(self.prefix, self.suffix.extract(idx))

    @classmethod
    def merge(cls, caches: list[SharedPrefixKVCache]) -> SharedPrefixKVCache:
        """A batch of single ones, one row each."""
        prefix = caches[0].prefix
        if any(cache.prefix is not prefix for cache in caches):
            prefix, rows = None, [cache.joined() for cache in caches]
        else:
            rows = [cache.suffix for cache in caches]
        return cls(prefix, rows[0].merge(rows))

    def joined(self) -> Any:
        """One sequence's ordinary cache of all that this one holds."""
        if self.prefix is None or not self._shared:
            return self.suffix
        made = self.prefix.suffix()
        made.offset = self.offset
        made.keys, made.values = (
            _join([run.used(side) for run, side in sides])
            for sides in (
                [(run, run.keys) for run in self._whole()],
                [(run, run.values) for run in self._whole()],
            )
        )
        return made

    def _whole(self) -> list[Run]:
        empty = self.suffix.empty()
        return self.prefix.runs if empty and self.prefix else self.runs()

    def _unshare(self) -> None:
        """Give every row of a batch a prefix of its own."""
        if self.prefix is None:
            return
        rows = [self.extract(i).joined() for i in range(self.suffix.offset.shape[0])]
        self.prefix, self.suffix = None, rows[0].merge(rows)

    @property
    def state(self) -> Any:
        """All arrays."""
        prefix = self.prefix.cache.state if self.prefix else ()
        return prefix, self.suffix.state

    def is_trimmable(self) -> bool:
        """Whether the newest positions can be dropped: yes."""
        return True

    def trim(self, n: int) -> int:
        """Drop the newest n positions; how many there were."""
        trimmed = self.suffix.trim(n)
        if self.prefix and trimmed < n:
            shorter = Prefix(self.prefix.cache)
            trimmed += shorter.cache.trim(n - trimmed)
            self.prefix = Prefix(shorter.cache)
        return trimmed

    def size(self) -> int:
        """Positions held, padding included."""
        return self._shared + self.suffix.size()

    def empty(self) -> bool:
        """Whether it never held anything."""
        return not self._shared and self.suffix.empty()

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, the prefix once."""
        prefix = self.prefix.cache.nbytes if self.prefix else 0
        return prefix + (0 if self.suffix.empty() else self.suffix.nbytes)


def _held(side: Any) -> Any:
    """Arrays of their own names."""
    if side is None or isinstance(side, mx.array):
        return None if side is None else mx.array(side)
    return tuple(mx.array(plane) for plane in side)


def _join(parts: list[Any]) -> Any:
    if isinstance(parts[0], mx.array):
        return mx.concatenate(parts, axis=2)
    planes = zip(*parts, strict=True)
    return tuple(mx.concatenate(list(plane), axis=2) for plane in planes)
