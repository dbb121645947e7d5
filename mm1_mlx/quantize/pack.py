"""Tensors of a model, one by one, into those of its packed modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import mlx.core as mx

from mm1_mlx.config import Packing
from mm1_mlx.shard import Deferred

LEAVES = ("weight", "scales", "biases")


def pack_tensors(
    tensors: Iterable[tuple[str, mx.array]], packed: Mapping[str, Packing]
) -> Iterator[tuple[str, mx.array]]:
    """The tensors as a checkpoint holds them, lazily; weights are rounded.

    Args:
        tensors: of a model that is not packed, by name.
        packed: how the modules are packed, by path.
    """
    for name, tensor in tensors:
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or path not in packed:
            yield name, tensor
            continue
        parts = mx.quantize(tensor, **packed[path].to_dict())
        for part, array in zip(LEAVES, parts, strict=False):
            yield f"{path}.{part}", array


def pack_deferred(
    tensors: Iterable[tuple[str, Deferred]], packed: Mapping[str, Packing]
) -> Iterator[tuple[str, Deferred]]:
    """``pack_tensors`` of tensors that are made when they are written."""
    for name, tensor in tensors:
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or path not in packed:
            yield name, tensor
            continue
        for part, deferred in _packed(tensor, packed[path]).items():
            yield f"{path}.{part}", deferred


def _packed(tensor: Deferred, way: Packing) -> dict[str, Deferred]:
    """The tensors of a packed weight, which is rounded once, when one is asked for."""
    held: dict[str, mx.array] = {}

    def pieces_of(part: str) -> Callable[[], Iterator[mx.array]]:
        def pieces() -> Iterator[mx.array]:
            if part not in held:
                held.update(_round(tensor, way))
            yield held.pop(part)

        return pieces

    # Nothing is computed for shapes and types.
    parts = mx.quantize(mx.zeros(tensor.shape, tensor.dtype), **way.to_dict())
    return {
        part: Deferred(tuple(array.shape), array.dtype, pieces_of(part))
        for part, array in zip(LEAVES, parts, strict=False)
    }


def _round(tensor: Deferred, way: Packing) -> dict[str, mx.array]:
    """The packed weight, a few rows at a time: the unpacked one is never whole."""
    *rows, width = tensor.shape
    rest = mx.zeros(0, tensor.dtype)
    rounded: list[list[mx.array]] = []
    for piece in tensor.pieces():
        values = mx.concatenate([rest, piece.flatten()])
        whole = values.size // width * width
        if whole:
            parts = mx.quantize(values[:whole].reshape(-1, width), **way.to_dict())
            mx.eval(parts)
            rounded.append(list(parts))
        # Evaluated, so that it does not hold the piece it is the end of.
        rest = mx.contiguous(values[whole:])
        mx.eval(rest)
    return {
        part: mx.concatenate(list(arrays)).reshape(*rows, -1)
        for part, arrays in zip(LEAVES, zip(*rounded, strict=True), strict=False)
    }
