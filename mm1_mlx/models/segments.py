"""Examples behind one another in one row, none of which sees another.

Each attends by itself, from position 0 on: an array mask over the whole row would lose
the fused gradients, and compute the scores that it hides.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.base import create_attention_mask


class Stretch(NamedTuple):
    """Segments of one length that stand behind one another.

    Attributes:
        number: how many.
        length: positions of each.
        mask: of each one's attention.
    """

    number: int
    length: int
    mask: Any


class Segments(NamedTuple):
    """All of a row's segments, in the place of an attention mask."""

    stretches: tuple[Stretch, ...]

    def apart(
        self,
        attend: Callable[[mx.array, mx.array, mx.array, Any], mx.array],
        *projected: mx.array,
    ) -> mx.array:
        """Attention [1, T, D] of queries, keys and values [1, T, D], segment by segment.

        ``attend`` is asked for segments of equal length at once, with their mask.
        """
        parts, start = [], 0
        for number, length, mask in self.stretches:
            stop = start + number * length
            q, k, v = (x[0, start:stop].reshape(number, length, -1) for x in projected)
            parts.append(attend(q, k, v, mask).reshape(1, number * length, -1))
            start = stop
        return mx.concatenate(parts, axis=1)


def segmented(lengths: Sequence[int], x: mx.array, window: int | None) -> Segments:
    """The segments of a row [1, T, D]; what is behind the last one is one more.

    Args:
        lengths: positions of each.
        x: the row.
        window: positions that a query looks back, itself included; None for all.
    """
    T = x.shape[1]
    rest = T - sum(lengths)
    assert x.shape[0] == 1, "segments stand in one row"
    assert rest >= 0, "segments are longer than their row"
    stretches = []
    for length, same in groupby([*lengths, *([rest] if rest else [])]):
        mask = create_attention_mask(x[:, :length], None, window_size=window)
        stretches.append(Stretch(len(list(same)), length, mask))
    return Segments(tuple(stretches))
