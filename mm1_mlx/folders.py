"""Where this program keeps what it made and could make again, and where users' paths lead."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

CACHE_VARIABLE = "MM1_CACHE"
# What a folder is known by: a run's record, and in it what was made; an adapter's and a
# model's config.
RUN_RECORD, MADE_ADAPTER, MADE_MODEL = "run.json", "adapter", "model"
ADAPTER_CONFIG, MODEL_CONFIG = "adapter_config.json", "config.json"


def cache_folder() -> Path:
    """``$MM1_CACHE``, else ``mm1`` in the user's cache folder; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE_VARIABLE) or Path(base) / "mm1")


def user_path(name: str) -> Path:
    """The path a user wrote; ``~`` is their home.

    Not ``Path.expanduser``, which refuses the name of a file that begins with a tilde.
    """
    return Path(os.path.expanduser(name))  # noqa: PTH111


def mistaken(folder: Path, wanted: Literal["model", "adapter"]) -> str | None:
    """What a folder is in place of what is wanted, and the way out; None if unknown."""
    if (folder / RUN_RECORD).is_file():
        adapter, model = folder / MADE_ADAPTER, folder / MADE_MODEL
        said = f"{folder} is the folder of a training run"
        if model.is_dir():
            if wanted == "model":
                return f"{said}; give the model in it, {model}"
            return f"{said} that made a model, no adapter; give {model} as the model"
        if not adapter.is_dir():
            return f"{said} that has not reached its end; go on with its command"
        if wanted == "adapter":
            return f"{said}; give the adapter in it, {adapter}"
        return (
            f"{said} that made an adapter; give the model that it was trained on, and "
            f"'--adapter {adapter}'"
        )
    if wanted == "model" and (folder / ADAPTER_CONFIG).is_file():
        return (
            f"{folder} is an adapter, no model; give the model that it was trained on, "
            f"and '--adapter {folder}'"
        )
    if wanted == "adapter" and (folder / MODEL_CONFIG).is_file():
        return f"{folder} is a model, no adapter"
    return None
