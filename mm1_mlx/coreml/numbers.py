"""Weights as a program holds them: in half or single precision, or in fewer bits."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mm1_mlx.coreml.tools import mb, types
from mm1_mlx.coreml.weights import Array
from mm1_mlx.errors import ConfigError

Precision = Literal["fp16", "fp32", "int8", "4bit"]
# Output channels that share a table of 16 numbers.
GROUP = 16
# After which a table hardly moves.
ROUNDS = 40


class Numbers:
    """Weights in a precision; everything is computed in fp16, or in fp32 for ``fp32``.

    Args:
        precision: ``int8``: matrices rounded to 255 steps, a scale for each output
            channel; ``4bit``: to the 16 numbers that lie nearest, a table for every 16.
    """

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self.name = "fp32" if precision == "fp32" else "fp16"
        self.dtype: Any = np.float32 if precision == "fp32" else np.float16

    def __call__(self, values: NDArray[Any], name: str = "a weight") -> NDArray[Any]:
        """The values in what is computed in.

        Raises:
            ConfigError: one is too large for it.
        """
        largest = float(np.abs(values).max(initial=0))
        # Written so that it refuses NaN, too.
        if not largest <= np.finfo(self.dtype).max:
            raise ConfigError(
                f"{name} holds {largest:.4g}, which {np.dtype(self.dtype).name} cannot; "
                "export with --precision fp32"
            )
        return np.ascontiguousarray(values, self.dtype)

    def scalar(self, value: float) -> Any:
        """A number in what is computed in."""
        return self.dtype(value)

    def matrix(self, values: Array, name: str) -> Any:
        """The weights [D, ...] of a layer, packed if the precision says so."""
        if self.precision == "int8":
            return self._rounded(values, name)
        if self.precision == "4bit":
            return self._looked_up(values, name)
        return self(values, name)

    def _rounded(self, values: Array, name: str) -> Any:
        axes = tuple(range(1, values.ndim))
        most = self(np.abs(values).max(axis=axes, keepdims=True), name)
        scale = self(most.astype(np.float32) / 127, name)
        # Of zeros any scale will do. Less than this, which weights below 0.008 would have, a
        # GPU may take for zero: they are rounded more coarsely instead.
        scale = np.maximum(scale, np.finfo(np.float16).tiny)
        rounded = np.rint(values / scale.astype(np.float32)).clip(-127, 127)
        return mb.constexpr_blockwise_shift_scale(
            data=rounded.astype(np.int8), scale=scale
        )

    def _looked_up(self, values: Array, name: str) -> Any:
        D = values.shape[0]
        groups = D // GROUP if D % GROUP == 0 else 1
        rows = values.reshape(groups, -1)
        tables = np.stack([table(row) for row in rows])
        indices = np.stack(
            [
                np.searchsorted(_between(centers), row)
                for centers, row in zip(tables, rows, strict=True)
            ]
        )
        kind = types.nptype_from_builtin(types.uint4)
        lut = self(tables, name).reshape(groups, *[1] * (values.ndim - 1), -1, 1)
        return mb.constexpr_lut_to_dense(
            indices=indices.reshape(values.shape).astype(kind), lut=lut
        )


def table(values: Array, count: int = 16) -> Array:
    """The numbers nearest to which all values lie, ascending: k-means in one dimension.

    From evenly filled bins; sorted values make a round a search and a difference.
    """
    values = np.sort(values)
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    # Of tens of thousands of tables, most calls of numpy take longer than their work.
    centers = values[((np.arange(count) + 0.5) / count * values.size).astype(int)]
    centers = centers.astype(np.float64)
    for _ in range(ROUNDS):
        cuts = values.searchsorted(_between(centers).astype(values.dtype))
        ends = np.concatenate([[0], cuts, [values.size]])
        filled = ends[1:] - ends[:-1]
        total = sums[ends]
        means = (total[1:] - total[:-1]) / np.maximum(filled, 1)
        moved = np.where(filled > 0, means, centers)
        if (np.abs(moved - centers) <= 1e-6 * np.abs(centers)).all():
            break
        centers = moved
    return np.sort(centers).astype(np.float32)


def _between(centers: NDArray[Any]) -> NDArray[Any]:
    """Where one center ends to be the nearest and the next one begins."""
    return (centers[1:] + centers[:-1]) / 2
