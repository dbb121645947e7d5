"""What a picture may be given as, and how large it may be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mm1_mlx.config import ImageConfig


@dataclass(frozen=True)
class Frame:
    """A picture out of a video: never split into tiles."""

    image: Image.Image


@dataclass(frozen=True)
class Viewed:
    """A picture that becomes tiles in a way of its own; ``split``: several, if it may."""

    source: str | Path | bytes | Image.Image
    config: ImageConfig
    split: bool = True


# A str is a path or a ``data:image/...;base64,...`` URI.
ImageSource = str | Path | bytes | Image.Image | Frame | Viewed


@dataclass(frozen=True)
class Limits:
    """What one request may bring, checked before the first picture is decoded."""

    max_pictures: int = 24
    # Pixels of one picture, of all together, and along one side.
    max_pixels: int = 64_000_000
    max_total_pixels: int = 128_000_000
    # Pixels of an animation's frames up to the last one that is wanted: to reach it, all
    # before it are drawn.
    max_animation_pixels: int = 1_000_000_000
    # Pixels of all tiles together.
    max_tile_pixels: int = 2**27
    max_side: int = 16_384
    # Encoded bytes of one picture.
    max_bytes: int = 32 * 2**20


DEFAULT_LIMITS = Limits()


def name_of(source: ImageSource, number: int) -> str:
    """What messages call a picture: its path, or its place among the pictures."""
    if isinstance(source, Viewed):
        return name_of(source.source, number)
    if isinstance(source, Path) or (isinstance(source, str) and not is_data(source)):
        text = str(source)
        return repr(text if len(text) <= 200 else f"{text[:100]}...{text[-50:]}")
    return f"picture {number}"


def is_data(source: str) -> bool:
    """Whether a text is a data URI, and no path."""
    return source[:5].lower() == "data:"
