"""States as [1, L, C], what Core ML's matrix products and fused attention take.

The layout for GPU and CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mm1_mlx.coreml.layout import Value
from mm1_mlx.coreml.numbers import Numbers
from mm1_mlx.coreml.tools import mb
from mm1_mlx.coreml.weights import Array


class NLC:
    """``layout.Layout`` with the channels last."""

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers

    def patches(self, image: Value, weight: Array, bias: Array, name: str) -> Value:
        P, D = weight.shape[-1], weight.shape[0]
        x = mb.conv(
            x=image,
            # Never packed: it is small, and all that follows rests on it.
            weight=self.numbers(weight, name),
            bias=self.numbers(bias, name),
            strides=[P, P],
            pad_type="valid",
        )
        return self._from_grid(x, D, name)

    def rows(self, table: Array) -> Any:
        return self.numbers(table[None])

    def vector(self, values: Array) -> Any:
        return self.numbers(values[None, None])

    def linear(self, x: Value, weight: Array, bias: Array | None, name: str) -> Value:
        added = {} if bias is None else {"bias": self.numbers(bias, name)}
        return mb.linear(
            x=x, weight=self.numbers.matrix(weight, name), **added, name=name
        )

    def layer_norm(
        self, x: Value, weight: Array, bias: Array, eps: float, name: str
    ) -> Value:
        return mb.layer_norm(
            x=x,
            axes=[-1],
            gamma=self.numbers(weight, name),
            beta=self.numbers(bias, name),
            epsilon=self.numbers.scalar(eps),
            name=name,
        )

    def rms_norm(self, x: Value, weight: Array, eps: float, name: str) -> Value:
        # In float32: the squares of residual states leave half precision.
        wide = mb.cast(x=x, dtype="fp32")
        mean = mb.reduce_mean(x=mb.mul(x=wide, y=wide), axes=[-1], keep_dims=True)
        wide = mb.mul(x=wide, y=mb.rsqrt(x=mean, epsilon=eps))
        return mb.mul(x=self._narrow(wide), y=self.vector(weight), name=name)

    def attend(self, q: Value, k: Value, v: Value, heads: int, name: str) -> Value:
        _, L, D = q.shape
        split = [
            mb.transpose(
                x=mb.reshape(x=x, shape=[1, x.shape[1], heads, D // heads]),
                perm=[0, 2, 1, 3],
            )
            for x in (q, k, v)
        ]
        x = mb.scaled_dot_product_attention(
            query=split[0], key=split[1], value=split[2], name=name
        )
        return mb.reshape(x=mb.transpose(x=x, perm=[0, 2, 1, 3]), shape=[1, L, D])

    def join(self, parts: Sequence[Any]) -> Value:
        return mb.concat(values=list(parts), axis=1)

    def cut(self, x: Value, start: int, name: str) -> Value:
        return mb.slice_by_index(x=x, begin=[0, start, 0], end=list(x.shape), name=name)

    def mean(self, x: Value, name: str) -> Value:
        return mb.reduce_mean(x=x, axes=[1], keep_dims=True, name=name)

    def resample(self, x: Value, matrix: Array, name: str) -> Value:
        C = x.shape[-1]
        (s, g), by = matrix.shape, self.numbers(matrix, name)
        x = mb.matmul(x=by, y=mb.reshape(x=x, shape=[g, g * C]))
        x = mb.matmul(x=by[None], y=mb.reshape(x=x, shape=[s, g, C]), name=name)
        return mb.reshape(x=x, shape=[1, s * s, C])

    def depthwise(self, x: Value, weight: Array, name: str) -> Value:
        _, L, C = x.shape
        g = math.isqrt(L)
        x = mb.reshape(x=mb.transpose(x=x, perm=[0, 2, 1]), shape=[1, C, g, g])
        x = mb.conv(x=x, weight=self.numbers(weight, name), groups=C, pad_type="same")
        return self._from_grid(x, C, name)

    def result(self, x: Value, name: str) -> Value:
        return mb.cast(x=x, dtype="fp32", name=name)

    def _from_grid(self, x: Value, C: int, name: str) -> Value:
        L = x.shape[2] * x.shape[3]
        x = mb.reshape(x=x, shape=[1, C, L])
        return mb.transpose(x=x, perm=[0, 2, 1], name=name)

    def _narrow(self, x: Value) -> Value:
        return mb.cast(x=x, dtype=self.numbers.name)
