"""A picture that is named into one of a conversation, checked by opening it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mm1_mlx.image import DEFAULT_LIMITS, decode, encoded, name_of, open_picture

from .conversation import Shown

# A data URI's name.
EMBEDDED = "picture in the chat's file"


def read_picture(source: str | Path) -> Shown:
    """The picture in a file or data URI.

    Raises:
        PromptError: it cannot be read.
    """
    name = name_of(source, 1)
    data = encoded(source, name, DEFAULT_LIMITS)
    shown = str(source) if isinstance(source, Path) else EMBEDDED
    return Shown(shown, data, upright(data, name).size)


def upright(data: bytes, name: str) -> Any:
    """The Pillow image of an encoded picture, in mode RGB."""
    return decode(open_picture(data, name, DEFAULT_LIMITS), name)
