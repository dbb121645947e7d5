"""A video -> frames at even distances: an animated file, a folder or a list of pictures.

MM1.5 (arXiv 2409.20566), section 5.1: 24 uniformly sampled frames, none split into tiles.
Which frame of each stretch is taken is not stated; here its middle.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from PIL import Image

from mm1_mlx.errors import PromptError
from mm1_mlx.image import (
    DEFAULT_LIMITS,
    Frame,
    ImageSource,
    Limits,
    name_of,
    open_picture,
    pillow_guard,
)

NUM_FRAMES = 24
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".heic", ".heif", ".avif"),
)
FILMS = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")

# A folder or animated file by its path, an animated file's bytes, or pictures in order.
VideoSource = str | Path | bytes | Sequence[ImageSource]


def load_frames(
    source: VideoSource, count: int = NUM_FRAMES, limits: Limits = DEFAULT_LIMITS
) -> list[Frame]:
    """At most ``count`` frames of a video, in order and evenly apart.

    Raises:
        PromptError: the source holds no frames, or one that cannot be read.
    """
    if type(count) is not int or not 1 <= count <= limits.max_pictures:
        raise PromptError(
            f"{count!r:.40} frames were asked for, expected 1 to {limits.max_pictures}"
        )
    if isinstance(source, str | Path):
        if str(source)[:5].lower() == "data:":
            return _animation_frames(source, count, limits)
        if not str(source):
            raise PromptError("the video's path is empty; give a file or a folder")
        path = Path(source)
        if path.is_dir():
            return _list_frames(_pictures_in(path), count, limits)
        if path.suffix.lower() in FILMS and path.exists():
            raise PromptError(
                f"{str(path)!r} is a film, which cannot be decoded here; make a folder of "
                f"frames first: ffmpeg -i {path.name} frames/%05d.png"
            )
        return _animation_frames(path, count, limits)
    if isinstance(source, bytes):
        return _animation_frames(source, count, limits)
    if not isinstance(source, Sequence):
        raise PromptError(
            f"a video is of type {type(source).__name__}, expected a path, bytes or a "
            "list of pictures"
        )
    return _list_frames(cast(Sequence[ImageSource], source), count, limits)


def choose_frames(total: int, count: int) -> list[int]:
    """Indices of ``count`` of ``total`` frames: the middles of equal stretches."""
    if total <= count:
        return list(range(total))
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def _pictures_in(folder: Path) -> list[ImageSource]:
    """The folder's pictures, numbers in their names in the order of their values."""
    paths = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
    if not paths:
        raise PromptError(f"{str(folder)!r} holds no pictures; give a folder of frames")
    paths.sort(key=_natural)
    return list(paths)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isdecimal() else (-1, part)
        for part in re.split(r"(\d+)", path.name)
    ]


def _list_frames(
    pictures: Sequence[ImageSource], count: int, limits: Limits
) -> list[Frame]:
    if not pictures:
        raise PromptError("the video has no frames; give at least one picture")
    return [
        Frame(open_picture(pictures[i], name_of(pictures[i], i + 1), limits))
        for i in choose_frames(len(pictures), count)
    ]


def _animation_frames(
    source: str | Path | bytes, count: int, limits: Limits
) -> list[Frame]:
    name = name_of(source, 1)
    image = open_picture(source, name, limits)
    with pillow_guard(f"{name} is damaged or cut short; save it again", name):
        chosen = choose_frames(getattr(image, "n_frames", 1), count)
        drawn = image.width * image.height * (chosen[-1] + 1)
        if drawn > limits.max_animation_pixels:
            raise PromptError(
                f"{name}: {chosen[-1] + 1} frames of {image.width} x {image.height} have "
                f"{drawn} pixels, expected at most {limits.max_animation_pixels}; scale "
                "the animation down or cut it"
            )
        total = image.width * image.height * len(chosen)
        if total > limits.max_total_pixels:
            raise PromptError(
                f"{name}: {len(chosen)} frames have {total} pixels together, expected at "
                f"most {limits.max_total_pixels}; ask for fewer or scale them down"
            )
        return [Frame(_frame(image, index)) for index in chosen]


def _frame(image: Image.Image, index: int) -> Image.Image:
    image.seek(index)
    return image.copy()
