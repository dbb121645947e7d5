"""Pictures below a folder that the server's owner named, and never beside it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .errors import APIError


def read(url: str, root: Path | None, max_bytes: int, param: str) -> bytes:
    """The bytes of a ``file://`` picture, one more than the limit if it is too long.

    Args:
        url: ``file:///`` and its path, from the file system's root or from the folder's.
        root: the folder, None where there is none.
        max_bytes: how long it may be.
        param: what errors call the field.

    Raises:
        APIError: 400; it is not below the folder, or no file.
    """
    if root is None:
        raise _refusal(
            "files of the server's are not read; send a data URI, or name a folder by "
            "--media-root",
            param,
        )
    parts = _parts(url, root, param)
    try:
        file = _open(root, parts)
        try:
            if stat.S_ISREG(os.fstat(file).st_mode):
                with open(file, "rb", closefd=False) as held:
                    return held.read(max_bytes + 1)
        finally:
            os.close(file)
    # A link, a folder, a missing file: which of them is nobody's business.
    except OSError:
        pass
    raise _refusal("there is no such picture below the media root", param)


def _parts(url: str, root: Path, param: str) -> list[str]:
    try:
        split = urlsplit(url)
    except ValueError:
        raise _refusal("the URL is malformed, expected file:///PATH", param) from None
    path = unquote(split.path)
    if split.netloc or split.query or split.fragment or "\0" in path:
        raise _refusal("the URL is malformed, expected file:///PATH", param)
    below = path.removeprefix(str(root)) if path.startswith(f"{root}/") else path
    parts = [part for part in below.split("/") if part]
    if not parts or any(part in (".", "..") for part in parts):
        raise _refusal("there is no such picture below the media root", param)
    return parts


def _open(root: Path, parts: list[str]) -> int:
    """A file below a folder, no part of whose way is a link."""
    way = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            inner = os.open(part, way | os.O_DIRECTORY, dir_fd=folder)
            os.close(folder)
            folder = inner
        # A pipe would wait for its other end.
        return os.open(parts[-1], way | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)


def _refusal(message: str, param: str) -> APIError:
    return APIError(400, f"{param}: {message}", param=param, code="invalid_image_url")
