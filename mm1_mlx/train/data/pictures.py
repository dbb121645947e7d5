"""What a row says of a picture -> where it is read from: never outside its folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mm1_mlx.errors import DataError
from mm1_mlx.files import lies_in
from mm1_mlx.image import ImageSource

# Columns of what cannot be shown.
UNSEEN = ("video", "videos", "audio", "audios")
_NAMES = ("images", "image", "file_name")

Find = Callable[[Any], ImageSource]


@dataclass(frozen=True)
class PictureFolder:
    """Where the relative paths of a data file begin.

    Attributes:
        path: the folder.
        outside: whether paths may lead out of it. Data from elsewhere must not make the
            user's other files part of what is trained on.
        way_out: what an error says to do about paths that do.
    """

    path: Path
    outside: bool = False
    way_out: str = (
        "give a folder that holds it (--image-folder), or trust the data (--outside)"
    )

    def find(self, source: Any) -> ImageSource:
        """The picture that a row names, not opened yet.

        Args:
            source: a path, a data URI, encoded bytes, a Pillow image, or Hugging Face's
                ``{"bytes": ..., "path": ...}``.

        Raises:
            DataError: it is none of these, or lies outside the folder.
        """
        if isinstance(source, Mapping):
            source = source.get("bytes") or source.get("path") or source.get("url")
        if isinstance(source, bytes | Image.Image):
            return source
        if not isinstance(source, str) or not source:
            raise DataError(
                f"a picture is {source!r:.60}, expected a path, a data URI or its bytes"
            )
        if source[:5].lower() == "data:":
            return source
        if "://" in source[:12]:
            raise DataError(
                f"picture {source!r:.80} is a URL, expected a file; download it first "
                "and give its path"
            )
        if "\0" in source:
            raise DataError(f"picture {source!r:.80} is no path: it holds a NUL")
        path = self.path / source
        try:
            inside = self.outside or lies_in(self.path, path)
        except (OSError, ValueError):
            inside = False
        if not inside:
            raise DataError(
                f"picture {source!r:.80} lies outside {self.path}; {self.way_out}"
            )
        return path


def pictures_of(values: Mapping[str, Any], find: Find) -> list[ImageSource]:
    """The row's pictures, in order.

    Raises:
        DataError: two keys name them, or one is none.
    """
    if values.get("images") and values.get("image"):
        raise DataError("it has both image and images, expected one of them")
    given: Any = next((values[name] for name in _NAMES if values.get(name)), [])
    return [find(source) for source in (given if isinstance(given, list) else [given])]


def has_pictures(values: Mapping[str, Any]) -> bool:
    """Whether a row names any."""
    return any(values.get(name) for name in _NAMES)


def check_seen(values: Mapping[str, Any], way_out: str) -> None:
    """Pass only if all of a row can be shown; ``way_out`` is what else can be done.

    Raises:
        DataError: it holds a film or a sound.
    """
    if unseen := [key for key in UNSEEN if values.get(key)]:
        raise DataError(
            f"its {unseen[0]} cannot be shown; give a film's frames as pictures, or "
            f"{way_out}"
        )
