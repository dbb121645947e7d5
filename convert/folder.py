"""The files of a checkpoint beside its weights, its config.json before all."""

from functools import cached_property
from pathlib import Path
from typing import Any

from mm1_mlx.errors import CheckpointError
from mm1_mlx.files import read_json, safe_join

from .place import SUBFOLDERS
from .shards import what_lies_in

# Fields of config.json that say how weights are packed.
PACKING = ("quantization", "quantization_config")


class Folder:
    """What a checkpoint says of itself, without its weights.

    Args:
        name: what to call it in errors.
        folder: where it lies.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder

    def file(self, name: str) -> Path | None:
        """The path of a file, None if there is none of that name."""
        path = safe_join(self.folder, *name.split("/"))
        return path if path.is_file() else None

    @cached_property
    def subfolders(self) -> tuple[str, ...]:
        """Folders with parts of the model: either all that are known, or none.

        Raises:
            CheckpointError: only some of them are there.
        """
        lost = [x for x in SUBFOLDERS if not self.file(f"{x}/config.json")]
        if lost and len(lost) < len(SUBFOLDERS):
            raise CheckpointError(
                f"{self.name} is incomplete: it lacks {lost[0]}/config.json, which "
                f"belongs beside its other parts, {', '.join({*SUBFOLDERS} - {*lost})}; "
                "get it again"
            )
        return () if lost else SUBFOLDERS

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file's object, None if there is no file of that name.

        Raises:
            CheckpointError: the file holds something else.
        """
        path = self.file(name)
        content = read_json(path) if path else {}
        if not isinstance(content, dict):
            raise CheckpointError(f"{self.name}: {name} is not a JSON object")
        return content if path else None

    @property
    def config(self) -> dict[str, Any]:
        """What ``content`` says of the model, not of how its weights are packed.

        Raises:
            CheckpointError: there is none.
        """
        return {k: v for k, v in self.content.items() if k not in PACKING}

    @cached_property
    def content(self) -> dict[str, Any]:
        """The content of config.json, or of open_clip's own where it is the only one.

        Raises:
            CheckpointError: there is none.
        """
        config = self.json("config.json")
        if config is None:
            config = self.json("open_clip_config.json")
        if config is None:
            raise CheckpointError(
                f"{self.name} has no config.json{what_lies_in(self.folder)}"
            )
        return config
