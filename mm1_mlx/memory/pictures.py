"""Pictures that were decoded before, by their encoded bytes and what becomes of them.

A conversation brings its earlier pictures with every question.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

from mm1_mlx.layout import Picture

# About 75 tiles of 378 pixels, or 24 of 672.
MAX_BYTES = 128 << 20


class PictureCache:
    """The tiles of pictures, those used last kept longest; for several threads.

    Args:
        max_bytes: how much memory they may take.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, Picture] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """The memory that the kept tiles take."""
        return self._bytes

    def find(self, key: Hashable) -> Picture | None:
        """The picture that was kept under a key."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def keep(self, key: Hashable, picture: Picture) -> None:
        """Keep a picture, in place of those used longest ago."""
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = picture
            self._bytes += _nbytes(picture)
            while self._bytes > self._max_bytes:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= _nbytes(dropped)

    def clear(self) -> None:
        """Let them all go."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0


def _nbytes(picture: Picture) -> int:
    return sum(tile.nbytes for tile in picture.tiles)
