"""Writes a model folder, which appears only when it is whole.

The manifest is written last and the folder renamed into place, so a killed run leaves
nothing that loads.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import mlx.core as mx

from mm1_mlx.checkpoint import (
    CONFIG,
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    check_names,
    model_shapes,
    read_manifest,
)
from mm1_mlx.config import MODEL_TYPE, MM1Config
from mm1_mlx.errors import CheckpointError
from mm1_mlx.files import fsync, read_json, safe_join, sha256

MAX_SHARD_BYTES = 1_000_000_000


class CheckpointWriter:
    """Writes a model folder that appears only when it is complete.

        with CheckpointWriter(out, config, source={"format": "llava_hf"}) as writer:
            writer.add("decoder.norm.weight", tensor)
            writer.add_file("tokenizer.json", path)

    Tensors are held until a shard is full, so memory stays near ``MAX_SHARD_BYTES``. The
    disk must have room for ``size`` bytes.

    Raises:
        CheckpointError: ``out`` exists and ``overwrite`` is false, the disk is too full,
            or the tensors are not exactly those of the config's model.
    """

    def __init__(
        self,
        out: Path,
        config: MM1Config,
        source: Mapping[str, Any],
        *,
        packed: Collection[str] = (),
        overwrite: bool = False,
        size: int = 0,
    ) -> None:
        # Resolved: "." and ".." have no name to write beside.
        self.out = out.resolve()
        self.overwrite = overwrite
        self.size = size
        self.config = config
        self.source = dict(source)
        self.folder = self._beside("partial")
        self.expected = model_shapes(config, packed)
        self.written: dict[str, tuple[int, ...]] = {}
        self.shard: dict[str, mx.array] = {}
        self.shard_bytes = 0
        self.shards: list[list[str]] = []
        self.total_bytes = 0

    def __enter__(self) -> Self:
        self._tidy()
        # Only now: a model may have come back.
        check_place(self.out, overwrite=self.overwrite)
        check_space(self.out, self.size)
        # Nearest first.
        self.made = [path for path in self.out.parents if not path.exists()]
        self.folder.mkdir(parents=True)
        return self

    def _beside(self, kind: str) -> Path:
        """A folder next to the model's place; nobody else would give one such a name."""
        return self.out.with_name(f"{self.out.name}.mm1-{kind}-{os.getpid()}")

    def _tidy(self) -> None:
        """Clear away what killed writers left; a model that stepped aside comes back."""
        for kind in ("old", "partial"):
            pattern = glob.escape(self.out.name) + f".mm1-{kind}-*"
            for left in self.out.parent.glob(pattern):
                if _is_alive(left.name.rpartition("-")[2]):
                    continue
                if kind == "old" and not self.out.exists():
                    left.rename(self.out)
                else:
                    shutil.rmtree(left, ignore_errors=True)

    def add(self, name: str, tensor: mx.array) -> None:
        """Write one tensor of the model.

        Raises:
            CheckpointError: the model has no such tensor, or another shape.
        """
        shape = tuple(tensor.shape)
        if self.expected.get(name) != shape or name in self.written:
            raise CheckpointError(
                f"tensor {name} {list(shape)} does not belong to the model, which "
                f"expects {self.expected.get(name)}"
            )
        if self.shard and self.shard_bytes + tensor.nbytes > MAX_SHARD_BYTES:
            self._write_shard()
        self.written[name] = shape
        self.shard[name] = tensor
        self.shard_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def add_file(self, name: str, content: bytes | Path) -> None:
        """Write one more file beside the weights: bytes, or a copy of a path."""
        target = safe_join(self.folder, name)
        target.write_bytes(
            content if isinstance(content, bytes) else content.read_bytes()
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.out.exists():
                with suppress(OSError):
                    for path in self.made:
                        path.rmdir()

    def _write_shard(self) -> None:
        self.shards.append(sorted(self.shard))
        path = self.folder / f"shard-{len(self.shards)}"
        try:
            mx.save_safetensors(
                f"{path}.safetensors", self.shard, metadata={"format": "mlx"}
            )
        except RuntimeError as error:
            raise CheckpointError(
                f"{self.out} cannot be written ({error}); is the disk full?"
            ) from None
        self.shard, self.shard_bytes = {}, 0

    def _finish(self) -> None:
        check_names(self.written, self.expected, self.out)
        self._write_shard()
        self._name_shards()
        config = json.dumps(self.config.to_dict(), indent=2)
        self.add_file(CONFIG, config.encode() + b"\n")
        for path in self.folder.iterdir():
            fsync(path)
        manifest = {
            "format_version": FORMAT_VERSION,
            "written_by": f"mm1-mlx {version('mm1-mlx')}",
            "source": self.source,
            "files": {
                path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
                for path in sorted(self.folder.iterdir())
            },
        }
        self.add_file(MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")
        fsync(self.folder / MANIFEST)
        fsync(self.folder)
        self._rename()

    def _name_shards(self) -> None:
        """Give the shards their Hugging Face names, and an index if there are several."""
        count, weight_map = len(self.shards), {}
        for i, names in enumerate(self.shards, 1):
            name = f"model-{i:05}-of-{count:05}.safetensors"
            name = name if count > 1 else "model.safetensors"
            (self.folder / f"shard-{i}.safetensors").rename(self.folder / name)
            weight_map.update(dict.fromkeys(names, name))
        if count > 1:
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": weight_map,
            }
            self.add_file(INDEX, json.dumps(index, indent=2).encode() + b"\n")

    def _rename(self) -> None:
        """Put the folder in its place; an old one steps aside first and goes last."""
        old = self._beside("old")
        if self.out.exists():
            if not self.overwrite:
                raise CheckpointError(
                    f"{str(self.out)!r} was made by somebody else meanwhile; choose "
                    "another name"
                )
            self.out.rename(old)
        try:
            self.folder.rename(self.out)
        except BaseException:
            if old.exists():
                old.rename(self.out)
            raise
        fsync(self.out.parent)
        shutil.rmtree(old, ignore_errors=True)


def check_place(out: Path, *, overwrite: bool) -> None:
    """Pass only where a model may be written.

    Raises:
        CheckpointError: something is there that must not be replaced.
    """
    if not out.exists():
        return
    if not overwrite:
        raise CheckpointError(
            f"{str(out)!r} already exists; choose another name or pass --overwrite"
        )
    if not _is_model(out):
        raise CheckpointError(
            f"{str(out)!r} is not a model folder and will not be overwritten; choose "
            "another name"
        )


def check_space(out: Path, size: int) -> None:
    """Pass only where the disk has room for so many bytes more.

    Raises:
        CheckpointError: it has not.
    """
    free = shutil.disk_usage(next(x for x in out.parents if x.exists())).free
    if size > free:
        raise CheckpointError(
            f"{str(out)!r} needs {size / 1e6:,.1f} MB, but its disk has {free / 1e6:,.1f} "
            "MB free; name a folder on another disk, or pass --dtype float16"
        )


def _is_model(path: Path) -> bool:
    """Whether a folder is a model of ours, of whatever version."""
    try:
        values = read_json(path / CONFIG)
        read_manifest(path)
    except (CheckpointError, OSError):
        return False
    return isinstance(values, dict) and values.get("model_type") == MODEL_TYPE


def _is_alive(process: str) -> bool:
    """Whether another process of this number runs, so that its folder is in use."""
    if not process.isdecimal() or int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
