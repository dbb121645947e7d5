"""Where this program keeps what it made and could make again, and where users' paths lead."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "MM1_CACHE"


def cache_folder() -> Path:
    """``$MM1_CACHE``, else ``mm1`` in the user's cache folder; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE_VARIABLE) or Path(base) / "mm1")


def user_path(name: str) -> Path:
    """The path a user wrote; ``~`` is their home.

    Not ``Path.expanduser``, which refuses the name of a file that begins with a tilde.
    """
    return Path(os.path.expanduser(name))  # noqa: PTH111
