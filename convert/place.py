"""Where a source lies: its folder, the folders inside, and the licence it names."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from mm1_mlx import hub
from mm1_mlx.checkpoint import CONFIG, read_manifest
from mm1_mlx.config import MODEL_TYPE
from mm1_mlx.errors import CheckpointError
from mm1_mlx.files import read_json
from mm1_mlx.folders import user_path

# Folders of a checkpoint that hold parts of a model with configs of their own: xtuner's.
SUBFOLDERS = ("visual_encoder", "projector")
_LICENCES = re.compile(r"[\w.-]+( and [\w.-]+)*")


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
    """The licence that a model card names, or what the parts of a model of ours have."""
    card = folder / "README.md"
    text = card.read_text(errors="replace") if card.is_file() else ""
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    licence = (
        re.search(r"^license: *['\"]?([\w.-]+)", front[1], re.M) if front else None
    )
    return licence[1] if licence else _recorded_licence(folder)


def _recorded_licence(folder: Path) -> str | None:
    own = recorded(folder)
    parts = own.get("parts")
    records = [own, *(parts.values() if isinstance(parts, dict) else ())]
    named = (x.get("licence") for x in records if isinstance(x, dict))
    # Somebody else may have written them, and they are shown on a terminal.
    found = [x for x in named if isinstance(x, str) and _LICENCES.fullmatch(x)]
    single = dict.fromkeys(x for names in found for x in names.split(" and "))
    return " and ".join(single) or None


def recorded(folder: Path) -> dict[str, Any]:
    """What the manifest of a model of ours says of its source; of others nothing."""
    with suppress(CheckpointError):
        config = read_json(folder / CONFIG)
        if isinstance(config, dict) and config.get("model_type") == MODEL_TYPE:
            source = read_manifest(folder).get("source")
            return source if isinstance(source, dict) else {}
    return {}
