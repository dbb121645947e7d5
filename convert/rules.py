"""The rule language: source tensor names to the model's, one table per format.

A table maps a name pattern, ``{}`` standing for a number, to one of

- a target pattern: the tensor as it is; its ``{}`` are the source's numbers in order,
  ``{-1}`` a number less one;
- an ``Op``: the tensor transposed, split, stacked or reshaped;
- ``None``: an explicit drop.

Every source tensor has exactly one rule and every tensor of the model exactly one
source. All of that is checked by name and shape before a weight is read: ops run on
lazy arrays of the headers' shapes, which are never evaluated.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Op:
    """Source tensors to target tensors.

    ``function`` takes one source, or all sources that differ only in their last number
    where ``gather`` is set, in its order.
    """

    targets: tuple[str, ...]
    function: Callable[..., tuple[mx.array, ...]]
    gather: bool = False


Rules = Mapping[str, str | Op | None]
Table = dict[str, str | Op | None]


def conv(target: str) -> Op:
    """A convolution's weight, [O, I, H, W] to [O, H, W, I]."""
    return Op((target,), lambda x: (x.transpose(0, 2, 3, 1),))


def transpose(target: str) -> Op:
    """A matrix the other way around."""
    return Op((target,), lambda x: (x.transpose(1, 0),))


def squeeze(target: str, *axes: int) -> Op:
    """Axes of size 1 left out: a 1 x 1 convolution as the linear layer it is."""
    return Op((target,), lambda x: (x.squeeze(axes),))


def split(*targets: str) -> Op:
    """Equal parts along the first axis: fused queries, keys and values."""
    return Op(targets, lambda x: tuple(mx.split(x, len(targets))))


def stack(target: str) -> Op:
    """Tensors that differ in their last number, along a new first axis: experts."""
    return Op((target,), lambda *xs: (mx.stack(list(xs)),), gather=True)
