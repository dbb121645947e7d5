"""Which files of a folder hold its weights, and pickles as safetensors."""

import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mm1_mlx import hub
from mm1_mlx.errors import CheckpointError
from mm1_mlx.files import read_json, safe_join
from mm1_mlx.hold import Hold
from mm1_mlx.partial import beside, left_beside
from mm1_mlx.writer import check_space

SAFETENSORS_INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"


def weight_files(folder: Path, *inside: str) -> list[str]:
    """The names of a folder's weight files: safetensors if there are any, else pickles.

    Args:
        folder: the checkpoint.
        inside: the folder in it that is meant, and not the checkpoint's own.

    Raises:
        CheckpointError: there are none, or one that an index lists is missing.
    """
    place = safe_join(folder, *inside) if inside else folder
    names = sorted(path.name for path in place.iterdir())
    for index, whole, pattern in (
        (SAFETENSORS_INDEX, "model.safetensors", r".*\.safetensors"),
        (BIN_INDEX, "pytorch_model.bin", r"pytorch_model.*\.bin|.*\.(pt|pth)"),
    ):
        if index in names:
            return _indexed(folder, *inside, index)
        if whole in names:
            return [whole]
        matches = [name for name in names if re.fullmatch(pattern, name)]
        if own := [x for x in matches if not x.startswith(hub.SECOND_COPIES)]:
            return own
    if only := hub.open_clip_weights(names):
        return only
    raise CheckpointError(f"{place} has no safetensors weights{what_lies_in(place)}")


def _indexed(folder: Path, *names: str) -> list[str]:
    """The files that an index lists; ``names`` are the folders it lies in, and its own."""
    path = safe_join(folder, *names)
    content = read_json(path)
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) for name in weights.values()
    ):
        raise CheckpointError(f"{path} has no weight_map of file names")
    files = sorted(set(weights.values()))
    inside = names[:-1]
    missing = [x for x in files if not safe_join(folder, *inside, x).is_file()]
    if missing:
        raise CheckpointError(
            f"{path.parent} lacks {len(missing)} of {len(files)} weight files, e.g. "
            f"{missing[:5]}; get it again"
        )
    return files


def what_lies_in(folder: Path) -> str:
    """What an unknown folder holds instead, for an error."""
    suffixes = {path.suffix for path in folder.iterdir()}
    for suffix, kind in ((".gguf", "GGUF"), (".npz", "NumPy"), (".onnx", "ONNX")):
        if suffix in suffixes:
            return (
                f" but {kind} files, which cannot be converted; use the safetensors "
                "checkpoint they were made from"
            )
    return "; give the folder of a Hugging Face checkpoint"


@contextmanager
def scratch(out: Path | None, size: int) -> Iterator[Path]:
    """A folder for so many bytes that are unpacked, on the disk of the model to be made.

    The system's own place for such things is often memory. What killed runs left is
    cleared away.

    Args:
        out: the model's place; None where none is made.
        size: in bytes.

    Raises:
        CheckpointError: the disk has too little room.
    """
    if out is None:
        with tempfile.TemporaryDirectory(prefix="mm1-convert-") as name:
            yield Path(name)
        return
    for left in left_beside(out, "unpacked"):
        # Unless a run is at work in it.
        with suppress(CheckpointError):
            Hold(left).remove()
    check_space(out, size)
    made = [path for path in out.parents if not path.exists()]
    hold = Hold(beside(out, f"unpacked-{secrets.token_hex(4)}"))
    try:
        yield hold.folder
    finally:
        hold.remove()
        # Only if nothing came to be there.
        with suppress(OSError):
            for path in made:
                path.rmdir()


def unpickle(paths: list[Path], folder: Path) -> list[Path]:
    """PyTorch pickles as safetensors files in ``folder``, by a child process.

    torch never enters this process, and ``weights_only`` keeps a pickle from running
    code in the child.

    Raises:
        CheckpointError: torch is missing, or a file is not a plain dict of tensors.
    """
    # As a file, so that only torch is imported; -P: never one of the current folder.
    script = Path(__file__).with_name("torch_bin.py")
    command = [sys.executable, "-P", str(script)]
    arguments = [*(str(path.resolve()) for path in paths), str(folder)]
    child = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=False
    )
    if child.returncode:
        lines = child.stderr.strip().splitlines()
        # Nothing is said where the system ended it.
        silent = (
            f"reading {paths[0].name} was ended (status {child.returncode}); is there "
            "enough memory?"
        )
        raise CheckpointError(lines[-1] if lines else silent)
    return sorted(folder.glob("*.safetensors"))
