"""Written down in a model's folder: whether it computes what its source computes."""

from pathlib import Path

from mm1_mlx.checkpoint import MANIFEST, read_manifest
from mm1_mlx.files import replace_json

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
    replace_json(path / PARITY, parity.to_dict())
    replace_json(path / MANIFEST, manifest)
