"""An RGB picture -> one or several normalised tiles, and where each one lies. No mlx.

MM1 (arXiv 2403.09611), section 4.1: an overview and a fixed grid of sub-images. MM1.5
(arXiv 2409.20566), section 3.5: a grid chosen by the picture's shape. LLaVA-NeXT: the best
of a list of grids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mm1_mlx.config import (
    AnyresTiling,
    DynamicTiling,
    ImageConfig,
    SplitTiling,
)
from mm1_mlx.resize import Pixels, mean_colour, normalise, resize, to_square

Tile = NDArray[np.float32]
Grid = tuple[int, int]  # rows, columns
Places = tuple[tuple[int, int], ...]

OVERVIEW = (0, 0)


def to_tiles(
    image: Image.Image, config: ImageConfig, *, split: bool = True
) -> tuple[tuple[Tile, ...], Places]:
    """The picture, in mode RGB, as tiles [size, size, 3] of mean 0, and their places.

    Args:
        image: the picture.
        config: how it becomes tiles.
        split: whether it may become several; else it is one tile without a place.
    """
    tiling = config.tiling if split else None
    if tiling is None:
        return (normalise(to_square(image, config, config.size), config),), ()
    grid, sheet = _SHEETS[tiling.kind](image, config, tiling)
    cells = {
        (row + 1, column + 1): _cell(sheet, row, column, config.size)
        for row in range(grid[0])
        for column in range(grid[1])
    }
    places = list(cells)
    if len(cells) > 1 or isinstance(tiling, AnyresTiling):
        cells[OVERVIEW] = to_square(image, config, config.size)
        last = getattr(tiling, "overview", "first") == "last"
        places = [*places, OVERVIEW] if last else [OVERVIEW, *places]
    tiles = tuple(normalise(cells[place], config) for place in places)
    return tiles, tuple(places) if len(places) > 1 else ()


def _cell(sheet: Pixels, row: int, column: int, size: int) -> Pixels:
    return sheet[row * size : (row + 1) * size, column * size : (column + 1) * size]


def _split_sheet(
    image: Image.Image, config: ImageConfig, tiling: SplitTiling
) -> tuple[Grid, Pixels]:
    sheet = to_square(image, config, tiling.grid * config.size)
    return (tiling.grid, tiling.grid), sheet


def _dynamic_sheet(
    image: Image.Image, config: ImageConfig, tiling: DynamicTiling
) -> tuple[Grid, Pixels]:
    """The picture, its shape kept, in the middle of its grid.

    MM1.5 states neither where the padding goes nor its colour: as ``resize: pad`` has it.
    """
    grid = choose_grid(image.size, config.size, tiling)
    width, height = grid[1] * config.size, grid[0] * config.size
    scale = min(width / image.width, height / image.height)
    inner = (
        max(1, min(width, round(image.width * scale))),
        max(1, min(height, round(image.height * scale))),
    )
    return grid, _centred(image, inner, (width, height), mean_colour(config))


def _anyres_sheet(
    image: Image.Image, config: ImageConfig, tiling: AnyresTiling
) -> tuple[Grid, Pixels]:
    grid = choose_resolution(image.size, config.size, tiling.grids)
    width, height = grid[1] * config.size, grid[0] * config.size
    if tiling.fill == "squash":
        return grid, np.asarray(resize(image, (width, height)))
    scale_x, scale_y = width / image.width, height / image.height
    if scale_x < scale_y:
        inner = (width, min(math.ceil(image.height * scale_x), height))
    else:
        inner = (min(math.ceil(image.width * scale_y), width), height)
    return grid, _centred(image, inner, (width, height), (0, 0, 0))


_SHEETS: dict[str, Callable[..., Any]] = {
    "split": _split_sheet,
    "dynamic": _dynamic_sheet,
    "anyres": _anyres_sheet,
}


def _centred(
    image: Image.Image,
    inner: tuple[int, int],
    outer: tuple[int, int],
    colour: tuple[int, int, int],
) -> Pixels:
    """The picture resized to ``inner``, in the middle of a sheet of one colour."""
    sheet = Image.new("RGB", outer, colour)
    place = ((outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2)
    sheet.paste(resize(image, inner), place)
    return np.asarray(sheet)


def grids_between(least: int, most: int) -> list[Grid]:
    """Every (rows, columns) of ``least`` to ``most`` tiles, by their number."""
    return [
        (count // columns, columns)
        for count in range(least, most + 1)
        for columns in range(count, 0, -1)
        if count % columns == 0
    ]


def choose_grid(size: tuple[int, int], side: int, tiling: DynamicTiling) -> Grid:
    """The grid of a picture of ``size`` (width, height) in pixels.

    Among the grids that hold the picture without scaling it down, the one with the
    least padding; if none does, the one in which it stays largest.

    Source: MM1.5 (arXiv 2409.20566), equation 1.
    """
    width, height = size

    def fit(grid: Grid) -> tuple[float, float]:
        """By how much the picture is scaled, and the padding in pixels."""
        rows, columns = grid
        scale = min(rows * side / height, columns * side / width)
        padding = rows * columns * side**2 - scale**2 * width * height
        # Rounded: what is equal differs by rounding alone. The fewest tiles come first.
        return round(scale, 9), round(padding, 3)

    grids = grids_between(tiling.min_tiles, tiling.max_grid_tiles)
    covering = [grid for grid in grids if fit(grid)[0] >= 1]
    if covering:
        return min(covering, key=lambda grid: fit(grid)[1])
    return min(grids, key=lambda grid: (-fit(grid)[0], fit(grid)[1]))


def choose_resolution(
    size: tuple[int, int], side: int, grids: tuple[Grid, ...]
) -> Grid:
    """The grid that keeps most of the picture's pixels, then wastes fewest of its own.

    Source: ``select_best_resolution`` of haotian-liu/LLaVA at c121f04.
    """
    width, height = size
    best: tuple[int, int] | None = None
    chosen = grids[0]
    for grid in grids:
        full_width, full_height = grid[1] * side, grid[0] * side
        scale = min(full_width / width, full_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        score = (kept, kept - full_width * full_height)
        if best is None or score > best:
            best, chosen = score, grid
    return chosen
