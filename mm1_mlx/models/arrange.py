"""The image tokens of a picture's tiles [K, D], joined to one run [T, D]."""

import math
from collections.abc import Sequence

import mlx.core as mx

from mm1_mlx.config import AnyresTiling, Tiling
from mm1_mlx.layout import Picture, content_of


def arrange(
    tiles: Sequence[mx.array],
    picture: Picture,
    tiling: Tiling | None,
    newline: mx.array | None,
) -> mx.array:
    """Image tokens [T, D] of one picture.

    Args:
        tiles: image tokens [K, D] of its tiles, in order.
        picture: the picture.
        tiling: how the model splits pictures.
        newline: the token [D] that ends every row, where the tiling has one.
    """
    if len(tiles) == 1:
        return tiles[0]
    merge = tiling.merge if isinstance(tiling, AnyresTiling) else "flat"
    if merge == "flat" or not picture.places:
        return mx.concatenate(list(tiles))
    grid = join_rows(tiles[1:], picture.grid)  # [H, W, D]
    if merge == "unpad":
        assert newline is not None
        crop = content_of(picture, math.isqrt(tiles[0].shape[0]))
        bottom, right = crop.top + crop.height, crop.left + crop.width
        grid = grid[crop.top : bottom, crop.left : right]
        ends = mx.broadcast_to(
            newline.astype(grid.dtype), (grid.shape[0], 1, *newline.shape)
        )
        grid = mx.concatenate([grid, ends], axis=1)
    return mx.concatenate([tiles[0], grid.flatten(0, 1)])


def join_rows(tiles: Sequence[mx.array], grid: tuple[int, int]) -> mx.array:
    """Vectors [K, D] of a grid's tiles as one map [rows * side, columns * side, D]."""
    rows, columns = grid
    K, D = tiles[0].shape
    side = math.isqrt(K)
    x = mx.stack(list(tiles)).reshape(rows, columns, side, side, D)
    return x.transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, D)
