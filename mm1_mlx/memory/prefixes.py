"""Key-value caches of prompts that were read before, for the prompts that begin alike.

A position is named by its token, or by what stands there instead: which image token of
which picture. Unlike mlx-lm's ``LRUPromptCache``, nothing is copied: what a prompt does
not share is cut off, or the arrays are shared and mlx copies them when they are written.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.generate import maybe_quantize_kv_cache

# Caches that are kept at most: each more prompt is compared with all of them, and thousands
# of a small model's took longer than to read it.
MAX_ENTRIES = 64

# A token, or a picture's digest and which of its image tokens.
Position = int | tuple[str, int]


@dataclass(frozen=True)
class KVPrecision:
    """How keys and values are held: packed to ``bits`` once they are many."""

    bits: int | None = None
    group_size: int = 64
    # Positions from which on they are packed.
    start: int = 0

    @property
    def limit(self) -> float:
        """How many positions may be held unpacked."""
        return math.inf if self.bits is None else self.start


def pack(cache: list[Any], precision: KVPrecision) -> None:
    """Pack a cache's keys and values once they are as many as ``precision`` says."""
    if precision.bits is not None:
        maybe_quantize_kv_cache(
            cache,
            quantized_kv_start=precision.start,
            kv_group_size=precision.group_size,
            kv_bits=precision.bits,
        )


@dataclass
class _Entry:
    positions: tuple[Position, ...]
    cache: list[Any]
    precision: KVPrecision
    packed: bool = field(init=False)
    # Counted once, and summed for each that is kept.
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.packed = hasattr(self.cache[0], "bits")
        self.nbytes = sum(layer.nbytes for layer in self.cache)


class PrefixCache:
    """The caches of prompts and answers, those used last kept longest.

    Args:
        max_bytes: how much memory they may take beside the one used last.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        # Used last, last.
        self._entries: list[_Entry] = []

    @property
    def nbytes(self) -> int:
        """The memory that the kept caches take."""
        return sum(entry.nbytes for entry in self._entries)

    def take(
        self, positions: Sequence[Position], precision: KVPrecision
    ) -> tuple[list[Any] | None, int]:
        """The cache of the longest known beginning, and its length; or None and 0.

        The last position is never part of it: its logits are wanted.
        """
        best, length = self._longest(positions, precision)
        if best is None:
            return None, 0
        surplus = len(best.positions) - length
        if surplus <= length:
            # What is lost is cheaper to compute again than the rest is to hold twice.
            self._remove(best)
            cache = best.cache
        else:
            cache = [_shared(layer) for layer in best.cache]
        for layer in cache:
            layer.trim(surplus)
        return cache, length

    def keep(
        self, positions: Sequence[Position], cache: list[Any], precision: KVPrecision
    ) -> None:
        """Keep a cache of at least so many positions, in place of its beginnings.

        It belongs to whoever takes it next. Of one whose arrays are part of others', keep
        what is ``copied``.
        """
        for layer in cache:
            layer.trim(layer.offset - len(positions))
        entry = _Entry(tuple(positions), cache, precision)
        self._entries = [
            other
            for other in self._entries
            if other.precision != precision
            or common(other.positions, positions) < len(other.positions)
        ]
        self._entries.append(entry)
        self.make_room(keep=1)

    def make_room(self, keep: int = 0) -> None:
        """Drop the caches used longest ago while they are, or take, more than they may.

        Args:
            keep: how many of those used last stay whatever they take.
        """
        del self._entries[:-MAX_ENTRIES]
        while len(self._entries) > keep and self.nbytes > self.max_bytes:
            del self._entries[0]
            mx.clear_cache()

    def clear(self) -> None:
        """Drop them all."""
        self._entries.clear()

    def longest(self, positions: Sequence[Position], precision: KVPrecision) -> int:
        """The length that ``take`` would find."""
        return self._longest(positions, precision)[1]

    def _longest(
        self, positions: Sequence[Position], precision: KVPrecision
    ) -> tuple[_Entry | None, int]:
        best, length = None, 0
        for entry in self._entries:
            if entry.precision == precision:
                shared = min(common(entry.positions, positions), len(positions) - 1)
                # So few would not have been packed.
                fits = not entry.packed or shared >= precision.start
                if shared > length and fits:
                    best, length = entry, shared
        return best, length

    def _remove(self, entry: _Entry) -> None:
        self._entries = [other for other in self._entries if other is not entry]


def copied(cache: list[Any]) -> list[Any]:
    """The same keys and values in arrays of their own.

    A row of a batch's arrays would hold all of them for as long as it is kept.
    """
    layers = [type(layer).from_state(tree_map(_apart, layer.state)) for layer in cache]
    mx.eval([layer.state for layer in layers])
    return layers


def _apart(x: Any) -> Any:
    # Not mx.contiguous, which leaves a whole row of an array where it lies.
    return x + mx.array(0, x.dtype) if isinstance(x, mx.array) else x


def _shared(layer: Any) -> Any:
    """A cache of the same arrays, which mlx copies once either is written to."""
    # An assignment to a part changes the Python object, so that each needs its own.
    state = tree_map(lambda x: x[...] if isinstance(x, mx.array) else x, layer.state)
    return type(layer).from_state(state)


def common(one: Sequence[Position], other: Sequence[Position]) -> int:
    """How many positions two prompts share from their beginning on."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
