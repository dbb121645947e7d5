"""Which row stands at a position: orders and mixtures as functions, without a state.

Whoever goes on at step 150,000 asks for its positions; nothing is replayed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Blocks whose rows are mixed with one another, where rows are read by blocks.
WINDOW = 4
_ROUNDS = 6
_WORD = 1 << 64
# The golden ratio's part behind the point, in words: its multiples fall evenly on [0, 1).
GOLDEN = 0x9E3779B97F4A7C15


def scramble(*numbers: int) -> int:
    """A number below 2**64 that looks as if drawn, made of others alone.

    Source: splitmix64's finaliser, https://prng.di.unimi.it/splitmix64.c
    """
    word = 0
    for number in numbers:
        word = (word + number + GOLDEN) % _WORD
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % _WORD
        word = (word ^ word >> 27) * 0x94D049BB133111EB % _WORD
        word ^= word >> 31
    return word


def permute(index: int, size: int, key: int) -> int:
    """Where ``index`` goes in a permutation of ``range(size)`` that is held nowhere.

    A Feistel network permutes the next power of four; what falls outside goes round again.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ scramble(key, turn, right) & mask
        index = left << half | right
        if index < size:
            return index


class Order:
    """Rows of one data set, every one once an epoch, in another order each time.

    Args:
        size: how many rows there are.
        key: of the order.
        blocks: how many rows stand together in the file and are read together; None
            where each is read by itself. Blocks come in any order, and the rows of
            ``WINDOW`` neighbours among them: so few have to be held.
    """

    def __init__(
        self, size: int, key: int, blocks: NDArray[np.int64] | None = None
    ) -> None:
        self.size = size
        self.key = key
        self._blocks = blocks
        # Of this epoch and the last: rows near an epoch's end are asked for by both.
        self._laid = lru_cache(maxsize=2)(self._lay)

    def __getitem__(self, number: int) -> int:
        """The row that comes as the ``number``-th, epoch after epoch."""
        epoch, index = divmod(number, self.size)
        if self._blocks is None:
            return permute(index, self.size, scramble(self.key, epoch))
        starts, ends = self._laid(epoch)
        window = int(np.searchsorted(ends[WINDOW - 1 :: WINDOW], index, side="right"))
        first = window * WINDOW
        begin = int(ends[first - 1]) if first else 0
        inside = int(ends[min(first + WINDOW, len(ends)) - 1]) - begin
        place = begin + permute(
            index - begin, inside, scramble(self.key, epoch, window)
        )
        block = int(np.searchsorted(ends, place, side="right"))
        return int(starts[block]) + place - (int(ends[block - 1]) if block else 0)

    def _lay(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The blocks in the epoch's order: where each begins, and rows up to its end."""
        assert self._blocks is not None
        count, key = len(self._blocks), scramble(self.key, epoch)
        order = [permute(i, count, key) for i in range(count)]
        begins = np.cumsum(self._blocks) - self._blocks
        return begins[order], np.cumsum(self._blocks[order])


class Picks:
    """Which data set comes at a position, and how many of it came before.

    Positions are multiples of the golden ratio on a circle, and a data set an arc of it,
    as long as its share: in any stretch of N positions it comes N times its share, but
    for a few (of 10,000 less than 6, in the tests), where drawing at random would be off
    by the root of N. How many came before is a sum that Euclid's algorithm finds.

    Args:
        weights: of the data sets; each above 0.
        seed: where on the circle the first position is.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        total = sum(weights)
        edges = np.cumsum([0, *weights]) / total
        self._edges = [round(edge * _WORD) for edge in edges[:-1].tolist()] + [_WORD]
        self._first = scramble(seed)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """The data set at a position, and how many of its rows were taken before."""
        place = (GOLDEN * position + self._first) % _WORD
        chosen = bisect_right(self._edges, place) - 1
        return chosen, self.count(position, chosen)

    def count(self, positions: int, chosen: int) -> int:
        """How many of the first positions are a data set's."""
        low, high = self._edges[chosen : chosen + 2]
        before = [
            _floor_sum(positions, _WORD, GOLDEN, self._first - edge)
            for edge in (low, high)
        ]
        return before[0] - before[1]


def _floor_sum(count: int, divisor: int, step: int, first: int) -> int:
    """The sum of (first + step * i) // divisor for i below ``count``; ``step`` >= 0.

    The whole parts are summed at once; what is left are the lattice points below a line,
    which exchanging its axes makes a smaller sum of the same kind.

    Source: ``floor_sum`` of https://github.com/atcoder/ac-library (CC0).
    """
    total = 0
    while count:
        total += count * (count - 1) // 2 * (step // divisor)
        total += count * (first // divisor)
        top = step % divisor * count + first % divisor
        step, divisor = divisor, step % divisor
        count, first = divmod(top, step)
    return total
