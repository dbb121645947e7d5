"""A hub repository in a foreign format, converted once into the user's cache."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .common import note, source_line


def resolve(model: str | None, yes: bool) -> str | None:
    """What ``load`` takes in place of ``model``: itself, or its converted copy.

    Raises:
        CheckpointError: there is no such repository, it is of no known format, or the
            download was not agreed to.
    """
    from mm1_mlx import hub
    from mm1_mlx.config import MODEL_TYPE

    name = repository_of(model)
    if name is None:
        return model
    copy = cached_copy(name)
    if copy.is_dir():
        return str(copy)
    if hub.model_type(name) == MODEL_TYPE:
        return model
    _agree(name, yes)
    from .convert import run_conversion

    run_conversion(name, copy)
    return str(copy)


def find(model: str | None, *, weights: bool = True) -> Path:
    """The folder of a command's model: its converted copy, or one in our format.

    Of a hub repository, without ``weights``, one that holds its small files alone.

    Raises:
        CheckpointError: there is no such folder and no such repository in our format.
    """
    from mm1_mlx.runtime import find_model

    name = repository_of(model)
    copy = cached_copy(name) if name else None
    return copy if copy and copy.is_dir() else find_model(model, weights=weights)


def repository_of(model: str | None) -> str | None:
    """The hub repository that a command's model is, None where it is none."""
    from mm1_mlx import hub
    from mm1_mlx.folders import user_path
    from mm1_mlx.runtime import MODEL_VARIABLE

    name = model or os.environ.get(MODEL_VARIABLE) or ""
    return None if user_path(name).exists() or not hub.is_repository(name) else name


def cached_copy(name: str) -> Path:
    """Where the converted copy of a repository is, or would be."""
    from mm1_mlx.folders import cache_folder

    return cache_folder() / name.replace("/", "--")


def _agree(name: str, yes: bool) -> None:
    """Show size and licence, and go on only if the user wants to."""
    from mm1_mlx.convert import describe
    from mm1_mlx.errors import CheckpointError

    note(source_line(describe(name)))
    if yes:
        return
    if not sys.stdin.isatty():
        raise CheckpointError(f"pass --yes to download and convert {name}")
    sys.stderr.write("download and convert it? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise CheckpointError(f"{name} was not downloaded")
