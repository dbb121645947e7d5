"""Files that somebody else wrote: names, JSON and safetensors, each checked before use."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from mm1_mlx.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20
# No folder, drive, stream, flag or hidden file can be spelled with it.
PLAIN_NAME = re.compile(r"\w[\w.+-]{0,199}", re.ASCII)
# The types of a safetensors file, and what mlx reads them as.
KINDS = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U64": mx.uint64,
    "U32": mx.uint32,
    "U16": mx.uint16,
    "U8": mx.uint8,
    "I64": mx.int64,
    "I32": mx.int32,
    "I16": mx.int16,
    "I8": mx.int8,
    "BOOL": mx.bool_,
    "C64": mx.complex64,
    "F8_E4M3": mx.uint8,
    "F8_E5M2": mx.uint8,
}


@dataclass(frozen=True)
class Entry:
    """What a safetensors header says of a tensor.

    Attributes:
        shape: its shape.
        kind: its type, as the format spells it.
        start: where in the file its bytes begin.
    """

    shape: tuple[int, ...]
    kind: str
    start: int


def read_json(path: Path) -> Any:
    """The parsed file.

    Raises:
        CheckpointError: it is missing, too large or not JSON.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} is {size:,} bytes, more than the {MAX_JSON_BYTES:,} allowed"
            )
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} is not valid JSON ({error}); mend it, or get it again"
        ) from None


def safe_join(root: Path, *names: str) -> Path:
    """``root / name`` for a plain file name out of an untrusted file.

    Args:
        root: the folder that is trusted.
        names: the file's name, behind those of the folders that it lies in.

    Raises:
        CheckpointError: the name could reach outside ``root``.
    """
    for name in names:
        if not PLAIN_NAME.fullmatch(name):
            raise CheckpointError(f"{root}: file name {name!r:.80} is not allowed")
    path = root.joinpath(*names)
    if not lies_in(root, path):
        raise CheckpointError(f"{path} is a link out of its folder")
    return path


def lies_in(root: Path, path: Path) -> bool:
    """Whether a path leads to something in a folder, wherever its links go.

    A link in a snapshot of the hub's cache may lead to the blobs beside the snapshots.
    """
    root = root.resolve()
    # os.path: unlike Path.resolve, it bears a link to itself.
    beyond = Path(os.path.realpath(path))
    if root in beyond.parents:
        return True
    # By a link that lies in the folder: ``..`` would name what no snapshot holds.
    above = Path(os.path.realpath(path.parent))
    linked = os.path.islink(path) and root in (above, *above.parents)  # noqa: PTH114
    return linked and any(
        x.name == "snapshots" and x.parent / "blobs" in beyond.parents
        for x in root.parents
    )


def read_shard(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file, lazily.

    The strict Rust parser reads the header first: mlx alone accepts overlapping,
    wrapped and truncated tensors.

    Raises:
        CheckpointError: the file is missing, truncated or damaged.
    """
    check_shard(path)
    try:
        return mx.load(str(path), format="safetensors")  # type: ignore[return-value]
    except RuntimeError as error:
        raise CheckpointError(f"{path} cannot be used ({_reason(error)})") from None


def check_shard(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a safetensors file, from its header.

    Raises:
        CheckpointError: the file is missing, truncated or damaged.
    """
    return {name: entry.shape for name, entry in read_header(path).items()}


def read_header(path: Path) -> dict[str, Entry]:
    """What a safetensors file says of its tensors.

    Raises:
        CheckpointError: the file is missing, truncated or damaged.
    """
    try:
        # Overlaps, holes and sizes are the strict parser's to refuse.
        with safe_open(path, framework="numpy"), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        return {
            name: Entry(tuple(x["shape"]), x["dtype"], 8 + size + x["data_offsets"][0])
            for name, x in header.items()
        }
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or cut off ({_reason(error)}); download or convert it again"
        ) from None


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0].removeprefix("Error while deserializing header: ")


def sha256(path: Path) -> str:
    """The file's digest, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_json(path: Path, content: Any) -> None:
    """Put a JSON file in the place of one, at once."""
    written = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        written.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        fsync(written)
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk; on macOS past the drive's own cache too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if not _full_fsync(descriptor):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _full_fsync(descriptor: int) -> bool:
    """Whether the drive's cache was flushed; network and FAT volumes cannot."""
    command = getattr(fcntl, "F_FULLFSYNC", None)
    if command is None:
        return False
    try:
        fcntl.fcntl(descriptor, command)
    except OSError:
        return False
    return True
