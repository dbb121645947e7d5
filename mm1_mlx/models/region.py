"""A region of a picture as one continuous token: Ferret's spatial-aware visual sampler.

Ferret (arXiv 2310.07704), section 3.2. Which points are anchors and which are their
neighbours depends on the points alone, so NumPy decides it; the device computes features.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mm1_mlx.config import RegionConfig
from mm1_mlx.layout import Picture
from mm1_mlx.models.arrange import join_rows

# x and y in 0..1, [P, 2].
Points = NDArray[np.float32]
# Where a picture's overview is among its tiles.
_OVERVIEW = (0, 0)


class RegionSampler(nn.Module):
    """Region tokens [R, D] of a picture.

    Args:
        features: of every tile of the picture, [L, C] each, in the tiles' order.
        picture: the picture; its ``regions`` say where to look.

    Source: ``GeoRegionSampler`` of apple/ml-ferret at 3c9e5c9, ferret/model/ferret_arch.py,
    which draws its points and the first anchor at random; here both are given, and the
    first point is the first anchor.
    """

    def __init__(self, config: RegionConfig) -> None:
        super().__init__()
        C, last = config.input_size, config.num_sub_points[-1]
        sizes = (config.num_points, *config.num_sub_points)
        self.transposed = config.transposed
        self.stages = [
            Stage(C, count, config.num_neighbours) for _, count in pairwise(sizes)
        ]
        self.flatten_proj = nn.Linear(last * C, C)
        self.out_proj = nn.Linear(C, config.output_size)

    def __call__(self, features: Sequence[mx.array], picture: Picture) -> mx.array:
        grid = region_map(features, picture)
        return mx.stack([self.token(grid, points) for points in picture.regions])

    def token(self, grid: mx.array, points: Points) -> mx.array:
        """The token [D] of one region, from a map [H, W, C]."""
        x = sample(grid, points, transposed=self.transposed)
        for stage in self.stages:
            x, points = stage(x, points)
        return self.out_proj(self.flatten_proj(x.flatten())).astype(grid.dtype)


class Stage(nn.Module):
    """Fewer points [M, C], each with what changes around it, and where they are [M, 2]."""

    def __init__(self, width: int, num_points: int, num_neighbours: int) -> None:
        super().__init__()
        self.num_points, self.num_neighbours = num_points, num_neighbours
        self.diff_proj = nn.Linear(width + 2, width + 2)
        self.agg_proj = nn.Linear(2 * (width + 2), width)
        self.norm = nn.LayerNorm(width)

    def __call__(self, x: mx.array, points: Points) -> tuple[mx.array, Points]:
        chosen = farthest(points, self.num_points)
        near = nearest(points, points[chosen], self.num_neighbours)
        # Float32 up to the token, as the points are: what changes between near points is
        # less than half precision keeps, and the norm makes it large.
        x = mx.concatenate([x, mx.array(points)], axis=1)  # [P, C + 2]
        anchors = x[mx.array(chosen)][:, None]
        changes = self.diff_proj(x[mx.array(near)] - anchors)  # [M, k, C + 2]
        both = mx.concatenate([changes, mx.broadcast_to(anchors, changes.shape)], -1)
        return self.norm(nn.relu(self.agg_proj(both))).max(1), points[chosen]


def region_map(features: Sequence[mx.array], picture: Picture) -> mx.array:
    """The map [H, W, C] that a picture's regions are read from.

    Of a tiled picture the sum of its tiles, joined, and of its overview, every feature of
    which is repeated over the tiles.

    Source: apple/ml-ferret at 3c9e5c9, ferretui/model/ferret_arch.py.
    """
    side = math.isqrt(features[0].shape[0])
    if not picture.places:
        return features[0].reshape(side, side, -1)
    overview = picture.places.index(_OVERVIEW)
    base = features[overview].reshape(side, side, -1)
    rows, columns = picture.grid
    tiles = [x for i, x in enumerate(features) if i != overview]
    base = mx.repeat(mx.repeat(base, rows, axis=0), columns, axis=1)
    return base + join_rows(tiles, (rows, columns))


def sample(grid: mx.array, points: Points, *, transposed: bool) -> mx.array:
    """Features [P, C] of a map [H, W, C] between its positions, in float32.

    The corners of the picture are the middles of the corner positions.

    Args:
        grid: the map.
        points: where.
        transposed: whether x counts rows and y columns.
    """
    H, W, C = grid.shape
    x, y = points.T
    row, column = (x, y) if transposed else (y, x)
    rows, columns = _between(row, H), _between(column, W)
    flat = grid.reshape(-1, C)
    corners = [
        flat[mx.array(i * W + j)] * mx.array(a * b)[:, None]
        for i, a in rows
        for j, b in columns
    ]
    return sum(corners[1:], corners[0])


def _between(share: NDArray[np.float32], length: int) -> list[tuple[Any, Any]]:
    """The two places along an axis that each share of it lies between, and their weights."""
    place = share * np.float32(length - 1)
    low = np.floor(place).astype(np.int32)
    weight = (place - low).astype(np.float32)
    return [(low, 1 - weight), (np.minimum(low + 1, length - 1), weight)]


def farthest(points: Points, count: int) -> NDArray[np.intp]:
    """Indices [count] of points far from each other, the first one first.

    Each next one is the farthest from all before it; of equals the first.
    """
    chosen = np.zeros(count, dtype=np.intp)
    distance = np.full(len(points), np.inf, dtype=np.float32)
    for i in range(1, count):
        apart = ((points - points[chosen[i - 1]]) ** 2).sum(-1)
        distance = np.minimum(distance, apart)
        chosen[i] = distance.argmax()
    return chosen


def nearest(points: Points, anchors: Points, count: int) -> NDArray[np.intp]:
    """Indices [M, count] of the points nearest to each anchor, itself among them.

    In double precision: on a lattice many are equally near, and rounding would choose
    between them. Of equals the first.
    """
    apart = anchors[:, None].astype(np.float64) - points
    return (apart**2).sum(-1).argsort(axis=-1, kind="stable")[:, :count]
