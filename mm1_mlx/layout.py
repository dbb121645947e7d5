"""What stands where: the tiles of pictures, and the spans of a prompt they fill.

Plain values shared by ``image``, ``prompt``, ``cache`` and ``models``; no mlx import.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mm1_mlx.config import AnyresTiling, MM1Config, Tiling


@dataclass(frozen=True)
class Picture:
    """One picture as the encoder will see it."""

    # Normalised tiles [H, W, 3], float32, in the order their image tokens will have.
    tiles: tuple[NDArray[np.float32], ...]
    # Width and height in pixels, after EXIF rotation, before any resizing.
    size: tuple[int, int]
    # sha256 of the tiles' bytes and shapes and of ``size``: equal pictures share it.
    digest: str
    # Row and column of every tile in the grid, counted from 1; (0, 0) is the overview.
    # Empty where the picture is one tile.
    places: tuple[tuple[int, int], ...] = ()
    kind: Literal["picture", "frame"] = "picture"
    # Points [P, 2] of every region that the prompt refers to: x and y in 0..1.
    regions: tuple[NDArray[np.float32], ...] = ()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles, the overview left out; (0, 0) without a grid."""
        rows, columns = zip(*self.places, strict=True) if self.places else ((0,), (0,))
        return max(rows), max(columns)


@dataclass(frozen=True)
class TileGroup:
    """Tiles of one resolution, encoded together."""

    pixels: NDArray[np.float32]  # [N, H, W, 3]
    # (picture, tile) of every row of ``pixels``.
    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Span:
    """A run of prompt positions that is not text."""

    start: int
    length: int
    kind: Literal["picture", "region", "frame"]
    # Which picture of the prompt it belongs to, counted from 0.
    picture: int
    digest: str
    # Which of the picture's image tokens comes first here.
    offset: int = 0

    @property
    def stop(self) -> int:
        """First position after the span."""
        return self.start + self.length


def group_tiles(pictures: Sequence[Picture]) -> list[TileGroup]:
    """The pictures' tiles, one group per resolution, in order of first appearance."""
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for i, picture in enumerate(pictures):
        for j, tile in enumerate(picture.tiles):
            groups.setdefault(tile.shape, []).append((i, j))
    return [
        TileGroup(
            pixels=np.stack([pictures[i].tiles[j] for i, j in places]),
            places=tuple(places),
        )
        for places in groups.values()
    ]


@dataclass(frozen=True)
class Crop:
    """The part of a grid of image tokens that is not padding."""

    top: int
    left: int
    height: int
    width: int


def content_of(picture: Picture, side: int) -> Crop:
    """Where the picture lies in its grid of tiles, padded around it to the grid's shape.

    Args:
        picture: a tiled picture.
        side: image tokens along one side of a tile.

    Source: ``unpad_image`` of LLaVA-NeXT, as transformers 5.23 has it.
    """
    rows, columns = picture.grid
    height, width = rows * side, columns * side
    w, h = picture.size
    if w / h > width / height:
        inner = int(round(h * (width / w), 7))
        top = (height - inner) // 2
        return Crop(top, 0, height - 2 * top, width)
    inner = int(round(w * (height / h), 7))
    left = (width - inner) // 2
    return Crop(0, left, height, width - 2 * left)


def count_picture_tokens(picture: Picture, config: MM1Config) -> int:
    """Image tokens of a picture, those of its regions not counted."""
    K = config.num_image_tokens
    tiling = config.image.tiling if config.image else None
    unpads = isinstance(tiling, AnyresTiling) and tiling.merge == "unpad"
    if not unpads or not picture.places:
        return K * len(picture.tiles)
    crop = content_of(picture, math.isqrt(K))
    return K + crop.height * (crop.width + 1)


def most_picture_tokens(config: MM1Config) -> int:
    """Image tokens of the picture that has most of them."""
    K = config.num_image_tokens
    image = config.image
    if image is None or image.tiling is None:
        return K
    tiling = image.tiling
    if not isinstance(tiling, AnyresTiling) or tiling.merge != "unpad":
        return K * image.max_tiles
    side = math.isqrt(K)
    sheets = ((rows * side, columns * side) for rows, columns in tiling.grids)
    return K + max(height * (width + 1) for height, width in sheets)


def indicator_texts(picture: Picture, number: int, tiling: Tiling | None) -> list[str]:
    """The text before each of a picture's tiles; empty where there is none.

    MM1.5 (arXiv 2409.20566), section 3.5: ``index`` names picture, row and column, (0, 0)
    being the overview; ``seps`` sets ":" before the overview, "," between columns and
    "<n>" between rows. How an index is spelled is not stated.

    Args:
        picture: a picture of one or several tiles.
        number: which picture of the prompt it is, counted from 0.
        tiling: how the model splits pictures.
    """
    kind = getattr(tiling, "indicators", "none")
    if kind == "none" or not picture.places:
        return []
    if kind == "index":
        return [f"({number},{row},{column})" for row, column in picture.places]
    return [_separator(place) for place in picture.places]


def _separator(place: tuple[int, int]) -> str:
    row, column = place
    if place == (0, 0):
        return ":"
    if column > 1:
        return ","
    return "<n>" if row > 1 else ""
