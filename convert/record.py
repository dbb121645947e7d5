"""Written down in a model's folder: whether it computes what its source computes."""

import json
import os
from pathlib import Path
from typing import Any

from mm1_mlx.checkpoint import MANIFEST, read_manifest
from mm1_mlx.files import fsync

from .verify import Parity

PARITY = "parity.json"


def record(path: Path, parity: Parity) -> None:
    """Write ``parity.json``, and in the manifest whether the model passed.

    Raises:
        CheckpointError: the folder has no manifest.
    """
    manifest = read_manifest(path)
    source = manifest.get("source")
    known = source if isinstance(source, dict) else {}
    manifest["source"] = known | {"parity_checked": parity.passed}
    _replace(path / PARITY, parity.to_dict())
    _replace(path / MANIFEST, manifest)


def _replace(path: Path, content: dict[str, Any]) -> None:
    """Put a JSON file in the place of one, at once."""
    written = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        written.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        fsync(written)
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)
    fsync(path.parent)
