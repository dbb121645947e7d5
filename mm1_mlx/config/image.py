"""How a picture becomes normalised tiles: one, or several of a large one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mm1_mlx.config.limits import MAX_HIDDEN_SIZE, MAX_TILE_PIXELS, MAX_TILES
from mm1_mlx.section import Section, check_sizes, require

# Text between the tiles of a picture: nothing, MM1.5's (picture, row, column) before each,
# or its ":" "," "<n>" between overview, columns and rows.
Indicators = Literal["none", "index", "seps"]


@dataclass(frozen=True, kw_only=True)
class SplitTiling(Section):
    """An overview and a fixed grid of sub-images (MM1, section 4.1: 1344 = 2 x 672)."""

    kind: Literal["split"] = "split"
    # Sub-images along one side.
    grid: int = 2
    # MM1 does not state the order; MM1.5 found "last" slightly better.
    overview: Literal["first", "last"] = "first"
    indicators: Indicators = "none"

    def __post_init__(self) -> None:
        check_sizes(self, 8, "grid")

    @property
    def max_tiles(self) -> int:
        """Most tiles of one picture, the overview included, which a grid of one lacks."""
        return self.grid**2 + (self.grid > 1)


@dataclass(frozen=True, kw_only=True)
class DynamicTiling(Section):
    """A grid chosen by the picture's shape, and an overview (MM1.5, section 3.5)."""

    kind: Literal["dynamic"] = "dynamic"
    # Bounds of the number of sub-images, the overview not counted.
    min_tiles: int = 4
    max_grid_tiles: int = 9
    overview: Literal["first", "last"] = "last"
    indicators: Indicators = "none"
    # With more pictures than these in a prompt none is split.
    max_pictures: int = 2

    def __post_init__(self) -> None:
        check_sizes(self, MAX_TILES, "max_grid_tiles", "max_pictures")
        check_sizes(self, self.max_grid_tiles, "min_tiles")

    @property
    def max_tiles(self) -> int:
        """Most tiles of one picture, the overview included, which a grid of one lacks."""
        return self.max_grid_tiles + (self.max_grid_tiles > 1)


@dataclass(frozen=True, kw_only=True)
class AnyresTiling(Section):
    """An overview and the best of a list of grids (LLaVA-NeXT's anyres)."""

    kind: Literal["anyres"] = "anyres"
    # (rows, columns) of tiles.
    grids: tuple[tuple[int, int], ...]
    # pad: black around the picture that keeps its shape; squash: the picture is stretched.
    fill: Literal["pad", "squash"] = "pad"
    # flat: tile after tile; rows: the grid's image tokens row by row across tiles;
    # unpad: so, without those of the padding, and a newline after every row.
    merge: Literal["flat", "rows", "unpad"] = "unpad"

    def __post_init__(self) -> None:
        require(len(self.grids) > 0, "AnyresTiling.grids is empty")
        for rows, columns in self.grids:
            require(
                rows >= 1 and columns >= 1 and rows * columns <= MAX_TILES,
                f"AnyresTiling.grids: {rows} x {columns} is outside 1..{MAX_TILES} tiles",
            )
        require(
            self.merge != "unpad" or self.fill == "pad",
            "AnyresTiling.merge: 'unpad' needs fill 'pad'",
        )

    @property
    def max_tiles(self) -> int:
        """Most tiles of one picture, the overview included."""
        return max(rows * columns for rows, columns in self.grids) + 1


Tiling = SplitTiling | DynamicTiling | AnyresTiling


@dataclass(frozen=True, kw_only=True)
class ImageConfig(Section):
    """How a picture becomes normalised tiles."""

    # Side of a tile, in pixels.
    size: int
    # squash: both sides to ``size``; crop: shortest edge to ``crop_from``, then the
    # centre; pad: a square of the mean colour around the picture, then ``size``.
    resize: Literal["squash", "crop", "pad"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    # bilinear is TensorFlow's: it reads four pixels, however much smaller the result.
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    # Length of the shortest edge before the centre is cut out; None means ``size``.
    crop_from: int | None = None
    # Where the cut begins if its margins cannot be equal: half of them rounded down, as
    # transformers and TensorFlow do, or to the nearest even number, as torchvision does.
    crop_rounding: Literal["down", "even"] = "down"
    # How a large picture becomes several tiles; None means one tile a picture.
    tiling: SplitTiling | DynamicTiling | AnyresTiling | None = None

    def __post_init__(self) -> None:
        check_sizes(self, MAX_HIDDEN_SIZE, "size")
        require(
            self.max_tiles * self.size**2 <= MAX_TILE_PIXELS,
            f"ImageConfig: {self.max_tiles} tiles of {self.size} x {self.size} pixels a "
            f"picture are more than {MAX_TILE_PIXELS} pixels",
        )
        require(
            all(value > 0 for value in self.std),
            f"ImageConfig.std: {self.std} must be positive",
        )
        if self.crop_from is not None:
            check_sizes(self, MAX_HIDDEN_SIZE, "crop_from")
            require(
                self.resize == "crop" and self.crop_from >= self.size,
                f"ImageConfig.crop_from: {self.crop_from} needs resize 'crop' and at "
                f"least size {self.size}",
            )
        require(
            self.resample == "bicubic"
            or (self.resize in ("squash", "crop") and self.tiling is None),
            "ImageConfig.resample: 'bilinear' needs resize 'squash' or 'crop' and no "
            "tiling",
        )

    @property
    def max_tiles(self) -> int:
        """Most tiles of one picture."""
        return self.tiling.max_tiles if self.tiling else 1
