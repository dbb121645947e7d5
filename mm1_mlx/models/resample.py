"""Square grids of vectors resampled by a matrix per side: P X P^T per channel."""

import math
from functools import lru_cache

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


def resample(x: mx.array, matrix: mx.array) -> mx.array:
    """[N, s, s, C] of [N, g, g, C], both sides multiplied by the matrix [s, g]."""
    N, g, _, C = x.shape
    s = matrix.shape[0]
    matrix = matrix.astype(x.dtype)
    x = (matrix @ x.reshape(N, g, g * C)).reshape(N * s, g, C)
    return (matrix @ x).reshape(N, s, s, C)


def pooling_matrix(size: int, bins: int) -> mx.array:
    """Row-stochastic [bins, size]: the means of PyTorch's adaptive average pooling.

    Bin i covers floor(i * size / bins) to ceil((i + 1) * size / bins), so bins overlap
    where ``bins`` does not divide ``size`` (27 to 12: every bin is 3 wide).
    """
    return mx.array(_pooling(size, bins))


@lru_cache(maxsize=64)
def _pooling(size: int, bins: int) -> NDArray[np.float32]:
    matrix = np.zeros((bins, size), np.float32)
    for i in range(bins):
        start, stop = i * size // bins, -(-(i + 1) * size // bins)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def stretch(table: mx.array, grid_size: int, interpolation: str) -> mx.array:
    """A position embedding [g * g, C] for a grid of another size, [s * s, C]."""
    g, C = math.isqrt(table.shape[0]), table.shape[1]
    if g == grid_size:
        return table
    matrix = mx.array(_bicubic(g, grid_size, interpolation == "bicubic_antialias"))
    # Float32: half precision would round twice.
    x = resample(table.astype(mx.float32).reshape(1, g, g, C), matrix)
    return x.reshape(-1, C).astype(table.dtype)


@lru_cache(maxsize=64)
def _bicubic(size: int, target: int, antialias: bool) -> NDArray[np.float32]:
    """[target, size]: PyTorch's bicubic interpolation of one axis, align_corners=False.

    Without antialiasing Keys' kernel has a = -0.75 and edges are repeated; with it
    a = -0.5, the kernel widens as the grid shrinks, and weights outside are left out.
    """
    scale = size / target
    a, support = (-0.5, max(scale, 1.0)) if antialias else (-0.75, 1.0)
    matrix = np.zeros((target, size))
    for i in range(target):
        center = (i + 0.5) * scale - 0.5
        first = math.floor(center - 2 * support) + 1
        taps = np.arange(first, math.ceil(center + 2 * support))
        weights = _keys(np.asarray((taps - center) / support, np.float64), a)
        if antialias:
            inside = (taps >= 0) & (taps < size)
            taps, weights = taps[inside], weights[inside]
        np.add.at(matrix[i], taps.clip(0, size - 1), weights / weights.sum())
    return matrix.astype(np.float32)


def _keys(x: NDArray[np.float64], a: float) -> NDArray[np.float64]:
    """Keys' cubic convolution kernel."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
