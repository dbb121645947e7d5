"""States as [1, C, 1, L], the layout that the Neural Engine computes without copies.

Linear layers are 1 x 1 convolutions and heads are computed one by one.

Source: https://github.com/apple/ml-ane-transformers (Deploying Transformers on the Apple
Neural Engine).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mm1_mlx.coreml.layout import Value
from mm1_mlx.coreml.numbers import Numbers
from mm1_mlx.coreml.tools import mb
from mm1_mlx.coreml.weights import Array

# What a vector of zeros is divided by: half precision's least number of full precision.
SMALLEST = 2.0**-14


class BC1S:
    """``layout.Layout`` with the places last."""

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
        L = x.shape[2] * x.shape[3]
        return mb.reshape(x=x, shape=[1, D, 1, L], name=name)

    def rows(self, table: Array) -> Any:
        return self.numbers(table.T[None, :, None])

    def vector(self, values: Array) -> Any:
        return self.numbers(values[None, :, None, None])

    def linear(self, x: Value, weight: Array, bias: Array | None, name: str) -> Value:
        added = {} if bias is None else {"bias": self.numbers(bias, name)}
        weight = weight[:, :, None, None]
        return mb.conv(
            x=x, weight=self.numbers.matrix(weight, name), **added, name=name
        )

    def layer_norm(
        self, x: Value, weight: Array, bias: Array, eps: float, name: str
    ) -> Value:
        x = mb.sub(x=x, y=mb.reduce_mean(x=x, axes=[1], keep_dims=True))
        x = mb.mul(x=self._unit(x, eps), y=self.vector(weight))
        return mb.add(x=x, y=self.vector(bias), name=name)

    def rms_norm(self, x: Value, weight: Array, eps: float, name: str) -> Value:
        return mb.mul(x=self._unit(x, eps), y=self.vector(weight), name=name)

    def attend(self, q: Value, k: Value, v: Value, heads: int, name: str) -> Value:
        d = q.shape[1] // heads
        q = mb.mul(x=q, y=self.numbers.scalar(d**-0.5))
        k = mb.transpose(x=k, perm=[0, 3, 2, 1])
        split = [
            mb.split(x=x, split_sizes=[d] * heads, axis=axis) if heads > 1 else [x]
            for x, axis in ((q, 1), (k, 3), (v, 1))
        ]
        found = []
        for query, key, value in zip(*split, strict=True):
            scores = mb.einsum(values=(key, query), equation="bkhc,bchq->bkhq")
            shares = mb.softmax(x=scores, axis=1)
            found.append(mb.einsum(values=(value, shares), equation="bchk,bkhq->bchq"))
        return mb.concat(values=found, axis=1, name=name)

    def join(self, parts: Sequence[Any]) -> Value:
        return mb.concat(values=list(parts), axis=3)

    def cut(self, x: Value, start: int, name: str) -> Value:
        return mb.slice_by_index(
            x=x, begin=[0, 0, 0, start], end=list(x.shape), name=name
        )

    def mean(self, x: Value, name: str) -> Value:
        return mb.reduce_mean(x=x, axes=[3], keep_dims=True, name=name)

    def resample(self, x: Value, matrix: Array, name: str) -> Value:
        C = x.shape[1]
        (s, g), by = matrix.shape, self.numbers(matrix[None, None], name)
        x = mb.reshape(x=x, shape=[1, C, g, g])
        x = mb.matmul(x=x, y=by, transpose_y=True)
        x = mb.matmul(x=by, y=x, name=name)
        return mb.reshape(x=x, shape=[1, C, 1, s * s])

    def depthwise(self, x: Value, weight: Array, name: str) -> Value:
        _, C, _, L = x.shape
        g = math.isqrt(L)
        x = mb.reshape(x=x, shape=[1, C, g, g])
        x = mb.conv(x=x, weight=self.numbers(weight, name), groups=C, pad_type="same")
        return mb.reshape(x=x, shape=[1, C, 1, L], name=name)

    def result(self, x: Value, name: str) -> Value:
        x = mb.transpose(x=mb.squeeze(x=x, axes=[2]), perm=[0, 2, 1])
        return mb.cast(x=x, dtype="fp32", name=name)

    def _unit(self, x: Value, eps: float) -> Value:
        """Every vector over its root mean square.

        Squares are those of its numbers over the largest: they would leave half precision
        at both ends.
        """
        largest = mb.reduce_max(x=mb.abs(x=x), axes=[1], keep_dims=True)
        largest = mb.maximum(x=largest, y=self.numbers.scalar(SMALLEST))
        shares = mb.real_div(x=x, y=largest)
        squares = mb.mul(x=shares, y=shares)
        mean = mb.reduce_mean(x=squares, axes=[1], keep_dims=True)
        floor = mb.real_div(x=self.numbers.scalar(eps**0.5), y=largest)
        root = mb.sqrt(x=mb.add(x=mean, y=mb.mul(x=floor, y=floor)))
        return mb.real_div(x=x, y=mb.mul(x=root, y=largest))
