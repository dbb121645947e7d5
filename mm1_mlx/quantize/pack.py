"""Tensors of a model, one by one, into those of its packed modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import mlx.core as mx

from mm1_mlx.checkpoint import build_model, cast_to, device_dtype
from mm1_mlx.config import MM1Config, Packing
from mm1_mlx.models import MM1
from mm1_mlx.shard import Deferred

LEAVES = ("weight", "scales", "biases")


def pack_deferred(
    tensors: Iterable[tuple[str, Deferred]], packed: Mapping[str, Packing]
) -> Iterator[tuple[str, Deferred]]:
    """The tensors as a checkpoint holds them, rounded when they are written.

    Args:
        tensors: of a model that is not packed, by name.
        packed: how the modules are packed, by path.
    """
    for name, tensor in tensors:
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or path not in packed:
            yield name, tensor
            continue
        for part, deferred in _packed(tensor, packed[path]).items():
            yield f"{path}.{part}", deferred


def assemble(
    config: MM1Config,
    packed: Collection[str],
    tensors: Iterable[tuple[str, Deferred]],
) -> MM1:
    """The model of tensors that are not written, in the device's precision.

    Args:
        config: the model's.
        packed: the paths of its packed modules.
        tensors: all of its tensors, by name.
    """
    model = build_model(config, packed)
    weights = []
    for name, deferred in tensors:
        tensor = deferred.whole()
        floating = mx.issubdtype(tensor.dtype, mx.floating)
        cast = cast_to(device_dtype(tensor.dtype), tensor) if floating else tensor
        # One by one: what the tensor was made from is freed here.
        mx.eval(cast)
        weights.append((name, cast))
    model.load_weights(weights)
    model.eval()
    return model


def _packed(tensor: Deferred, way: Packing) -> dict[str, Deferred]:
    """The tensors of a packed weight.

    The integers, which may be a gigabyte, come as they are made; what is made with them
    is held until it is asked for. Float32 scales are asked for first, as they lie first
    in a file: then all is rounded again for the integers.
    """
    held: dict[str, mx.array] = {}

    def weight() -> Iterator[mx.array]:
        small: list[list[mx.array]] = []
        for integers, *rest in _round(tensor, way):
            small.append(rest)
            yield integers
            del integers
        for leaf, arrays in zip(LEAVES[1:], zip(*small, strict=True), strict=False):
            held[leaf] = mx.concatenate(list(arrays))

    def beside(leaf: str) -> Callable[[], Iterator[mx.array]]:
        def pieces() -> Iterator[mx.array]:
            if leaf not in held:
                for _ in weight():
                    pass
            yield held.pop(leaf)

        return pieces

    # Nothing is computed for shapes and types.
    parts = mx.quantize(mx.zeros(tensor.shape, tensor.dtype), **way.to_dict())
    return {
        leaf: Deferred(
            tuple(array.shape),
            array.dtype,
            weight if leaf == "weight" else beside(leaf),
        )
        for leaf, array in zip(LEAVES, parts, strict=False)
    }


def _round(tensor: Deferred, way: Packing) -> Iterator[tuple[mx.array, ...]]:
    """What the weight is packed into, a few rows at a time."""
    width = tensor.shape[-1]
    rest = mx.zeros(0, tensor.dtype)
    for piece in tensor.pieces():
        values = piece.reshape(-1)
        if rest.size:
            values = mx.concatenate([rest, values])
        whole = values.size // width * width
        # Evaluated, so that neither holds the piece that it is of.
        rest = mx.contiguous(values[whole:])
        mx.eval(rest)
        if whole:
            rows = values[:whole].reshape(-1, width)
            del piece, values
            parts = tuple(mx.quantize(rows, **way.to_dict()))
            mx.eval(parts)
            del rows
            yield parts
