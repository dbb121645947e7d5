"""Tensors of a model, one by one, into those of its packed modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import mlx.core as mx

from mm1_mlx.config import Packing

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
