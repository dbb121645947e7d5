"""Pillow held to its bounds: few pictures at a time, no warnings, one kind of error."""

from __future__ import annotations

import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from mm1_mlx.errors import PromptError

# What Pillow's readers raise on damaged bytes, beside DecompressionBombError.
PILLOW_ERRORS = (
    ArithmeticError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
# How many pictures are decoded at a time, in all threads together: bounds the memory.
DECODERS = 4
_TURNS = threading.BoundedSemaphore(DECODERS)


class _Silence:
    """No warnings while anybody is inside.

    ``catch_warnings`` swaps state of the whole process: the first one in does it and the
    last one out undoes it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._caught.__exit__(None, None, None)


_SILENCE = _Silence()


@contextmanager
def pillow_guard(message: str, name: str) -> Iterator[None]:
    """Pillow's failures as PromptError(message): its own texts can hold addresses."""
    with _TURNS, _SILENCE:
        try:
            yield
        except PromptError:
            raise
        except Image.DecompressionBombError:
            raise PromptError(
                f"{name} has too many pixels to be opened; scale it down"
            ) from None
        except PILLOW_ERRORS:
            raise PromptError(message) from None
