"""The rule language: source tensor names to the model's, one table per format.

A table maps a name pattern, ``{}`` standing for a number, to one of

- a target pattern: the tensor as it is; its ``{}`` are the source's numbers in order,
  ``{-1}`` a number less one;
- an ``Op``: the tensor transposed, split, stacked or added to;
- ``None``: an explicit drop.

Every source tensor has exactly one rule and every tensor of the model exactly one
source. All of that is checked by name and shape before a weight is read: ops run on
lazy arrays of the headers' shapes, which are never evaluated.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from mm1_mlx.errors import CheckpointError


@dataclass(frozen=True)
class Op:
    """Source tensors to target tensors.

    ``function`` takes one source, and the flags say of it what else.

    Attributes:
        targets: patterns of the names that the function's results get, in order.
        function: from arrays to one array for each target.
        gather: what the function makes of sources that differ only in their last number
            is stacked along a new first axis, in its order.
        scatter: the function takes each place along the source's first axis, which is
            the last number of the targets.
        each: what the function makes of each place along the source's first axis is
            stacked again.
        sized: the function takes the targets' shapes, too.
        others: names of more sources, which the function takes after the first; they
            have no rule of their own.
    """

    targets: tuple[str, ...]
    function: Callable[..., tuple[mx.array, ...]]
    gather: bool = False
    scatter: bool = False
    each: bool = False
    sized: bool = False
    others: tuple[str, ...] = ()


Rules = Mapping[str, str | Op | None]
Table = dict[str, str | Op | None]


def conv(target: str) -> Op:
    """A convolution's weight, [O, I, H, W] to [O, H, W, I], which mlx's own folders have."""
    return Op((target,), _channels_last, sized=True)


def _channels_last(
    x: mx.array, shapes: Sequence[tuple[int, ...]]
) -> tuple[mx.array, ...]:
    turned = x.transpose(0, 2, 3, 1)
    # By the target's shape: no name or file says which of the two a tensor is in.
    as_it_is = x.shape == shapes[0]
    if as_it_is and turned.shape == shapes[0]:
        raise CheckpointError(
            f"a convolution of shape {list(x.shape)} may be laid out in PyTorch's way or "
            "in mlx's, which its shape does not tell; it is not supported"
        )
    return (x if as_it_is else turned,)


def transpose(target: str) -> Op:
    """A matrix the other way around."""
    return Op((target,), lambda x: (x.transpose(1, 0),))


def squeeze(target: str, *axes: int) -> Op:
    """Axes of size 1 left out: a 1 x 1 convolution as the linear layer it is."""
    return Op((target,), lambda x: (x.squeeze(axes),))


def add(target: str, value: float) -> Op:
    """The tensor plus a constant: norms that are stored as what they differ from 1."""
    # In float32, rounded once to the source's own precision.
    return Op((target,), lambda x: ((x.astype(mx.float32) + value).astype(x.dtype),))


def split(*targets: str, axis: int = 0) -> Op:
    """Equal parts along an axis: fused queries, keys and values of equal heads."""
    return Op(targets, lambda x: tuple(mx.split(x, len(targets), axis)))


def divide(*targets: str) -> Op:
    """Parts along the first axis, each as long as its target is: grouped queries."""
    return Op(targets, _divide, sized=True)


def _divide(x: mx.array, shapes: Sequence[tuple[int, ...]]) -> tuple[mx.array, ...]:
    lengths = [shape[0] for shape in shapes]
    # The last part is whatever is left, so that a source that is too long shows.
    return tuple(mx.split(x, list(itertools.accumulate(lengths[:-1]))))


def join(target: str, *others: str, rows: int) -> Op:
    """At most ``rows`` of the tensor's first, then those of the others: a vocabulary."""
    return Op(
        (target,), lambda *xs: (mx.concatenate([x[:rows] for x in xs]),), others=others
    )


def stack(target: str) -> Op:
    """Tensors that differ in their last number, along a new first axis: experts."""
    return Op((target,), lambda x: (x,), gather=True)


def unstack(rule: str | Op) -> Op:
    """What ``rule`` makes of each place along the first axis: layers kept as one."""
    op = rule if isinstance(rule, Op) else Op((rule,), lambda x: (x,))
    return replace(op, scatter=True)


def each(op: Op) -> Op:
    """What ``op`` makes of each place along the first axis, stacked: fused experts."""
    return replace(op, each=True)
