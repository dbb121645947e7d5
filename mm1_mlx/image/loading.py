"""Pictures -> normalised tiles [H, W, 3]. No mlx.

Limits are checked on headers, before anything is decoded.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Protocol

from PIL import Image

from mm1_mlx.config import DynamicTiling, ImageConfig
from mm1_mlx.errors import PromptError, blaming
from mm1_mlx.image.decoding import decode
from mm1_mlx.image.opening import content, open_picture
from mm1_mlx.image.source import (
    DEFAULT_LIMITS,
    Frame,
    ImageSource,
    Limits,
    Viewed,
    name_of,
)
from mm1_mlx.layout import Picture
from mm1_mlx.tiling import to_tiles


class Seen(Protocol):
    """Pictures that were decoded before; ``memory.pictures.PictureCache`` is one."""

    def find(self, key: Hashable) -> Picture | None:
        """The picture that was kept under a key."""
        ...

    def keep(self, key: Hashable, picture: Picture) -> None:
        """Keep a picture for a while."""
        ...


def load_picture(source: ImageSource, config: ImageConfig) -> Picture:
    """The picture as normalised tiles [size, size, 3]; see ``load_pictures``."""
    return load_pictures([source], config)[0]


def load_pictures(
    sources: Sequence[ImageSource],
    config: ImageConfig,
    limits: Limits = DEFAULT_LIMITS,
    *,
    tiled: int | None = None,
    seen: Seen | None = None,
    first: int = 1,
) -> list[Picture]:
    """The pictures in order, upright, as normalised tiles [size, size, 3].

    Of an animation the first frame is taken; of a Pillow image the frame it is at.

    Args:
        sources: the pictures.
        config: how they become tiles.
        limits: what is refused.
        tiled: how many of the last pictures may become several tiles, None for all;
            those before stay at low resolution.
        seen: knows pictures by their encoded bytes, so that they need not be decoded.
        first: the number of the first of them, as messages count.

    Raises:
        PromptError: a picture cannot be read, or a limit is exceeded.
    """
    if len(sources) > limits.max_pictures:
        raise PromptError(
            f"{len(sources)} pictures were given, expected at most "
            f"{limits.max_pictures}; ask about fewer at a time"
        )
    opened: deque[tuple[Image.Image, str, ImageSource]] = deque()
    digests: list[str | None] = []
    for number, source in enumerate(sources, start=first):
        name = name_of(source, number)
        with blaming(picture=number - 1):
            given = content(source, name, limits)
            image = open_picture(given, name, limits)
        digest = None
        if seen is not None and isinstance(given, bytes):
            digest = hashlib.sha256(given).hexdigest()
        digests.append(digest)
        opened.append((image, name, source))
    total = sum(image.width * image.height for image, _, _ in opened)
    if total > limits.max_total_pixels:
        raise PromptError(
            f"{len(sources)} pictures have {total} pixels together, expected at most "
            f"{limits.max_total_pixels}; scale them down or ask about fewer at a time"
        )
    whole = _count_whole(len(sources), config, tiled)
    views = [
        _view(source, config, split=number >= whole)
        for number, source in enumerate(sources)
    ]
    pixels = sum((own.max_tiles if split else 1) * own.size**2 for own, split in views)
    if pixels > limits.max_tile_pixels:
        raise PromptError(
            f"{len(sources)} pictures may become tiles of {pixels} pixels together, "
            f"expected at most {limits.max_tile_pixels}; ask about fewer, or at a lower "
            "resolution"
        )
    pictures = []
    for number, (digest, (own, split)) in enumerate(
        zip(digests, views, strict=True), start=first
    ):
        key = (digest, own, split)
        picture = seen.find(key) if seen is not None and digest else None
        # Popped, so that only one decoded picture is held at a time.
        image, name, source = opened.popleft()
        if picture is None:
            with blaming(picture=number - 1):
                picture = _picture(image, name, source, own, split=split)
            if seen is not None and digest:
                seen.keep(key, picture)
        pictures.append(picture)
    return pictures


def _view(
    source: ImageSource, config: ImageConfig, *, split: bool
) -> tuple[ImageConfig, bool]:
    """How a picture becomes tiles, and whether it may become several."""
    if isinstance(source, Viewed):
        return source.config, split and source.split
    return config, split and not isinstance(source, Frame)


def _count_whole(count: int, config: ImageConfig, tiled: int | None) -> int:
    """How many of the first pictures stay one tile each."""
    tiling = config.tiling
    if isinstance(tiling, DynamicTiling) and count > tiling.max_pictures:
        return count
    return 0 if tiled is None else max(0, count - tiled)


def _picture(
    image: Image.Image,
    name: str,
    source: ImageSource,
    config: ImageConfig,
    *,
    split: bool,
) -> Picture:
    image = decode(image, name)
    tiles, places = to_tiles(image, config, split=split)
    head = (image.size, [tile.shape for tile in tiles], places)
    digest = hashlib.sha256(repr(head).encode())
    for tile in tiles:
        digest.update(tile.tobytes())
    return Picture(
        tiles=tiles,
        size=image.size,
        digest=digest.hexdigest(),
        places=places,
        kind="frame" if isinstance(source, Frame) else "picture",
    )
