"""What stands where: the tiles of pictures, and the spans of a prompt they fill.

Plain values shared by ``image``, ``prompt``, ``cache`` and ``models``; no mlx import.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Picture:
    """One picture as the encoder will see it."""

    # Normalised tiles [H, W, 3], float32, in the order their image tokens will have.
    tiles: tuple[NDArray[np.float32], ...]
    # Width and height in pixels, after EXIF rotation, before any resizing.
    size: tuple[int, int]
    # sha256 of the tiles' bytes and shapes and of ``size``: equal pictures share it.
    digest: str


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
