"""One safetensors file, written tensor by tensor and hashed on the way.

No tensor need be whole in memory: each comes in pieces, which are made when they are
written.

Source: https://github.com/huggingface/safetensors/blob/v0.6.2/README.md#format
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import mlx.core as mx

from mm1_mlx.files import KINDS

NAMES = {kind: name for name, kind in reversed(KINDS.items())}
# What freed pieces may go on holding: enough for the next ones of their sizes.
CACHE_BYTES = 256_000_000


@dataclass(frozen=True)
class Deferred:
    """A tensor that is made when it is written.

    Attributes:
        shape: its shape.
        dtype: its type.
        pieces: gives its values in order, cut anywhere, each piece made when asked for.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    pieces: Callable[[], Iterable[mx.array]]

    @classmethod
    def of(cls, tensor: mx.array) -> Self:
        """A tensor that is there, if only lazily."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: [tensor])

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.size

    def whole(self) -> mx.array:
        """The tensor, put together from its pieces."""
        pieces = [piece.reshape(-1) for piece in self.pieces()]
        return mx.concatenate(pieces).reshape(self.shape)

    def map(self, function: Callable[[mx.array], mx.array]) -> Deferred:
        """The tensor with every number changed by itself."""
        kind = function(mx.zeros(1, self.dtype)).dtype
        return Deferred(self.shape, kind, lambda: map(function, self.pieces()))


def header_of(tensors: Mapping[str, Deferred]) -> bytes:
    """The bytes before the tensors', which lie in the order of the mapping."""
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    start = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [start, start := start + tensor.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    # So that what follows is aligned for every type.
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def in_order(tensors: Mapping[str, Deferred]) -> dict[str, Deferred]:
    """The tensors as safetensors lays them out: wide types first, then by name."""
    keys = sorted(tensors, key=lambda name: (-tensors[name].dtype.size, name))
    return {name: tensors[name] for name in keys}


def write_shard(
    path: Path, tensors: dict[str, Deferred], written: Callable[[], None]
) -> str:
    """The sha256, in hexadecimal, of the file that now holds the tensors.

    Args:
        path: the file to write.
        tensors: what it holds, in order; left empty, so that each tensor is freed.
        written: called after every tensor.

    Raises:
        OSError: the disk is full, or does not take it for another reason.
    """
    digest = hashlib.sha256()
    header = header_of(tensors)
    with path.open("wb") as file, ThreadPoolExecutor(1) as pool:
        file.write(header)
        # One piece is hashed while the next is read and made.
        hashed = pool.submit(digest.update, header)
        for name in list(tensors):
            tensor = tensors.pop(name)
            start = file.tell()
            for piece in _bytes_of(tensor):
                hashed.result()
                hashed = pool.submit(digest.update, piece)
                file.write(piece)
            assert file.tell() - start == tensor.nbytes, name
            written()
        hashed.result()
    return digest.hexdigest()


def _bytes_of(tensor: Deferred) -> Iterator[memoryview]:
    """The tensor's bytes, piece by piece."""
    for piece in tensor.pieces():
        assert piece.dtype == tensor.dtype
        if piece.size:
            # As bytes: Python has no bfloat16.
            flat = mx.contiguous(piece).reshape(-1).view(mx.uint8)
            mx.eval(flat)
            yield memoryview(flat)  # type: ignore[arg-type]
        if mx.get_cache_memory() > CACHE_BYTES:
            mx.clear_cache()
