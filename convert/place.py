"""Where a source lies: its folder, the folders inside, and the licence it names."""

import re
from pathlib import Path

from mm1_mlx import hub
from mm1_mlx.errors import CheckpointError
from mm1_mlx.files import user_path

# Folders of a checkpoint that hold parts of a model with configs of their own: xtuner's.
SUBFOLDERS = ("visual_encoder", "projector")


def local_folder(name: str) -> Path | None:
    """The folder of that name, or None where the name can be a hub repository's.

    Raises:
        CheckpointError: it is neither.
    """
    path = user_path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{name} is a file; give the folder of a safetensors checkpoint with its "
            "config.json, or a hub repository"
        )
    if not hub.is_repository(name):
        raise CheckpointError(
            f"{name!r} is neither a folder nor a hub repository such as "
            "'llava-hf/llava-1.5-7b-hf'"
        )
    return None


def licence_of(folder: Path) -> str | None:
    """The licence that the front matter of a model card names."""
    card = folder / "README.md"
    text = card.read_text(errors="replace") if card.is_file() else ""
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    licence = (
        re.search(r"^license: *['\"]?([\w.-]+)", front[1], re.M) if front else None
    )
    return licence[1] if licence else None
