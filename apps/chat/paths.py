"""The paths of pictures in a line that was typed, pasted, or dropped onto a terminal.

Terminals drop paths quoted, with escaped spaces, as ``file://`` URLs, or just as they
are; which, is seen by what exists.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mm1_mlx.folders import user_path

# Words of a path whose spaces are not escaped.
MAX_WORDS = 16
# How a path begins that is dropped, rather than a word of a question.
DROPPED = re.compile(r"""['"]?(?:/|~/|file:///?|[A-Za-z]:\\)""")
_WORD = re.compile(r"\S+")

Fits = Callable[[Path], bool]


def take_pictures(line: str, suffixes: frozenset[str]) -> tuple[list[Path], str]:
    """The pictures that were dropped into a line, and the line without them.

    Args:
        line: what was typed.
        suffixes: of pictures' names, in small letters.
    """

    def fits(path: Path) -> bool:
        return path.suffix.lower() in suffixes and _is_file(path)

    paths: list[Path] = []
    kept: list[str] = []
    end = 0
    for start, stop, path in _found(line, DROPPED, fits):
        paths.append(path)
        kept.append(line[end:start].strip())
        end = stop
    kept.append(line[end:].strip())
    return paths, " ".join(text for text in kept if text) if paths else line


def split_paths(text: str) -> list[Path]:
    """All paths that a command is given; those that exist win over how they are spelled."""
    paths: list[Path] = []
    end = 0
    for start, stop, path in _found(text, re.compile(""), _is_file):
        paths += _spelled(text[end:start])
        paths.append(path)
        end = stop
    return paths + _spelled(text[end:])


def _found(
    line: str, begins: re.Pattern[str], fits: Fits
) -> Iterator[tuple[int, int, Path]]:
    """Where paths that fit stand in a line, the longest from each place on."""
    words = list(_WORD.finditer(line))
    number = 0
    while number < len(words):
        start = words[number].start()
        taken = 0
        if begins.match(line, start):
            for count in range(min(MAX_WORDS, len(words) - number), 0, -1):
                stop = words[number + count - 1].end()
                path = _first(line[start:stop], fits)
                if path is not None:
                    yield start, stop, path
                    taken = count
                    break
        number += taken or 1


def _first(text: str, fits: Fits) -> Path | None:
    """The first reading of a text as one path that fits."""
    if "\n" in text:
        return None
    readings = [text, *(_words(text) if len(_words(text)) == 1 else ())]
    for reading in readings:
        path = _path(reading)
        if path is not None and fits(path):
            return path
    return None


def _spelled(text: str) -> list[Path]:
    """The paths of words, spelled as for a shell."""
    words = _words(text) or text.split()
    return [path for word in words if (path := _path(word)) is not None]


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # An apostrophe, or a backslash at the end.
        return []


def _path(text: str) -> Path | None:
    if not text or "\0" in text:
        return None
    if text[:7].lower() == "file://":
        # file:///a and file://localhost/a.
        try:
            return Path(unquote(urlsplit(text).path))
        except ValueError:  # A bracket that is not closed.
            return None
    return user_path(text)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # A text that is too long for a name.
        return False
