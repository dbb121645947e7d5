"""A function of each value, a block at a time, so that its steps take little memory."""

from collections.abc import Callable

import mlx.core as mx

# Values of a block, whose steps a core's cache holds.
BLOCK = 1 << 18


def by_blocks(function: Callable[..., mx.array], *arrays: mx.array) -> mx.array:
    """``function`` of arrays of one shape, value by value.

    mlx's CPU backend makes the results of several operations before it frees the first.
    """
    size = arrays[0].size
    if size <= BLOCK:
        return function(*arrays)
    cuts = range(BLOCK, size, BLOCK)
    blocks = zip(*(mx.split(x.reshape(-1), cuts) for x in arrays), strict=True)
    return mx.concatenate([function(*block) for block in blocks]).reshape(
        arrays[0].shape
    )
