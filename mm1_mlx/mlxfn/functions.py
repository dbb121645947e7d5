"""The functions of a model that are traced into files, and the shapes they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mm1_mlx.caches.static import StaticKVCache
from mm1_mlx.config import MM1Config
from mm1_mlx.errors import ConfigError
from mm1_mlx.kernels.tracing import into_file
from mm1_mlx.mlxfn.sidecar import DECODER_FILE, ENCODE_FILE, Array, DType, Function
from mm1_mlx.models import MM1
from mm1_mlx.models.linear import drop_unpacked


def check_traceable(config: MM1Config) -> None:
    """Pass only if one trace per shape computes what the model does.

    Raises:
        ConfigError: names what cannot be traced.
    """
    if config.decoder is None or config.prompt is None:
        raise ConfigError("the model has no decoder, so it cannot answer")
    moe = config.decoder.moe
    if moe is not None and moe.capacity_factor is not None:
        raise ConfigError(
            f"decoder.moe.capacity_factor is {moe.capacity_factor}: the places of an "
            "expert depend on how many tokens are run at once, and exported functions run "
            "padding with them; set it to null"
        )
    if config.image is not None and config.image.tiling is not None:
        raise ConfigError(
            "the model splits pictures into tiles, and exported functions see one tile a "
            f"picture; pass --resolution {config.image.size}"
        )


class Traced:
    """A model's functions.

    Args:
        model: what is traced.
        capacity: positions of the cache.
        buckets: positions run at once, rising from 1.
    """

    def __init__(self, model: MM1, capacity: int, buckets: Sequence[int]) -> None:
        check_traceable(model.config)
        self.model = model
        self.capacity = capacity
        self.buckets = tuple(buckets)
        assert model.config.decoder is not None
        self.config = model.config.decoder
        self.dtype = model.decoder.norm.weight.dtype
        # Copies for a CPU's speed would be stored in the packed weights' place.
        drop_unpacked(model)

    def write(
        self, folder: Path, progress: Callable[[str, int, int], None]
    ) -> tuple[Function, ...]:
        """Trace the functions into files of a folder; what they take and give."""
        sees = self.model.config.sees
        total = int(sees) + 2 * len(self.buckets)
        written: list[Function] = []

        def trace(name: Any, file: str, exporter: Any, inputs: list[mx.array]) -> None:
            function = getattr(self, name)
            exporter(*inputs)
            # Lazy: only shapes and types are asked for.
            outputs = function(*inputs)
            written.append(
                Function(
                    name=name,
                    file=file,
                    inputs=tuple(map(_array, inputs)),
                    outputs=tuple(map(_array, outputs)),
                )
            )
            progress("trace", len(written), total)

        with into_file():
            if sees:
                with mx.exporter(str(folder / ENCODE_FILE), self.encode) as exporter:
                    trace("encode", ENCODE_FILE, exporter, [self._pixels()])
            with mx.exporter(str(folder / DECODER_FILE), self._decode) as exporter:
                for T in self.buckets:
                    tokens = mx.zeros((1, T), mx.int32)
                    trace("embed", DECODER_FILE, exporter, [tokens])
                for T in self.buckets:
                    D = self.config.hidden_size
                    rows = mx.zeros((1, T, D), self.dtype)
                    at = [mx.array(0, mx.int32), mx.array(0, mx.int32)]
                    inputs = [rows, *at, *self._caches()]
                    trace("run", DECODER_FILE, exporter, inputs)
        return tuple(written)

    def encode(self, pixels: mx.array) -> list[mx.array]:
        """Image tokens [K, D] of one picture's pixels [1, S, S, 3]."""
        tokens = self.model.connector(self.model.vision(pixels))
        return [tokens[0].astype(self.dtype)]

    def embed(self, tokens: mx.array) -> list[mx.array]:
        """Embeddings [1, T, D] of tokens [1, T]."""
        return [self.model.decoder.embed(tokens)]

    def run(
        self, x: mx.array, offset: mx.array, last: mx.array, *held: mx.array
    ) -> list[mx.array]:
        """Logits [1, V] of one row of embeddings [1, T, D], and the caches behind it."""
        pairs = zip(held[::2], held[1::2], strict=True)
        caches = [StaticKVCache(keys, values, offset) for keys, values in pairs]
        tokens = mx.zeros(x.shape[:2], mx.int32)
        states = self.model.decoder.hidden(tokens, caches, x)
        size = (1, 1, states.shape[-1])
        state = mx.slice(states, last.reshape(1), (1,), size)
        logits = self.model.decoder.logits(state[:, 0])
        return [logits, *(x for cache in caches for x in (cache.keys, cache.values))]

    def _decode(self, *inputs: mx.array) -> list[mx.array]:
        """Both functions of the decoder: a file holds one, which goes by its inputs."""
        return self.embed(*inputs) if len(inputs) == 1 else self.run(*inputs)

    def _pixels(self) -> mx.array:
        image = self.model.config.image
        assert image is not None
        return mx.zeros((1, image.size, image.size, 3))

    def _caches(self) -> list[mx.array]:
        """Empty keys and values of every layer, by turns."""
        sizes = (self.config.sizes(i) for i in range(self.config.num_hidden_layers))
        shapes = [
            (1, x.num_key_value_heads, self.capacity, self.config.head_dim)
            for x in sizes
        ]
        return [mx.zeros(shape, self.dtype) for shape in shapes for _ in range(2)]


def _array(x: mx.array) -> Array:
    kind = str(x.dtype).removeprefix("mlx.core.")
    return Array(shape=tuple(x.shape), dtype=cast(DType, kind))
