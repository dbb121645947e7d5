"""Writes a model folder, which appears only when it is whole.

The manifest is written last and the folder renamed into place, so a run that is killed
or stopped leaves nothing that loads, and the next one goes on where it was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
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
from mm1_mlx.files import fsync, read_json, replace_json, safe_join, sha256
from mm1_mlx.hold import LOCK
from mm1_mlx.partial import JOURNAL, Partial, beside
from mm1_mlx.shard import Deferred, header_of, in_order, write_shard

MAX_SHARD_BYTES = 1_000_000_000
# What a disk without room says.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class CheckpointWriter:
    """Writes a model folder that appears only when it is complete.

        with CheckpointWriter(out, config, source={"format": "llava_hf"}) as writer:
            writer.add("decoder.norm.weight", tensor)
            writer.add_file("tokenizer.json", path)

    Tensors are written when a shard of them is full, each as it is made and none held
    whole that comes in pieces.

    Args:
        out: the model's folder.
        config: the model's.
        source: what the manifest says of where it comes from.
        packed: the modules that are packed.
        overwrite: whether a model that is there is replaced.
        size: bytes that the disk must have room for, with what is there.
        fingerprint: of all that decides the tensors' values; what a run under an equal
            one wrote before it was killed or stopped, or the disk failed it, is not
            written again.
        progress: told, after every tensor, the number written so far and of all.

    Raises:
        CheckpointError: ``out`` exists and ``overwrite`` is false, another run is
            writing it, the disk is too full, or the tensors are not exactly those of
            the config's model.
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
        fingerprint: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        # Resolved: "." and ".." have no name to write beside.
        self.out = out.resolve()
        self.overwrite = overwrite
        self.size = size
        self.config = config
        self.source = dict(source)
        self.partial = Partial(self.out, fingerprint)
        self.expected = model_shapes(config, packed)
        self.progress = progress
        self.added: dict[str, tuple[int, ...]] = {}
        self.written = 0
        self.shard: dict[str, Deferred] = {}
        self.shard_bytes = 0
        self.shards: list[list[str]] = []
        self.total_bytes = 0
        self._flush = ThreadPoolExecutor(1)
        self._flushed: Future[None] | None = None

    def __enter__(self) -> Self:
        self.partial.open()
        try:
            # Only now: a model may have come back.
            check_place(self.out, overwrite=self.overwrite)
        except BaseException:
            self.partial.remove()
            raise
        try:
            check_space(self.out, self.size)
        except BaseException:
            self.partial.leave()
            raise
        return self

    def add(self, name: str, tensor: mx.array | Deferred) -> None:
        """Write one tensor of the model, when its shard is full.

        Raises:
            CheckpointError: the model has no such tensor, or another shape; or the disk
                is full.
        """
        if isinstance(tensor, mx.array):
            tensor = Deferred.of(tensor)
        if self.expected.get(name) != tensor.shape or name in self.added:
            raise CheckpointError(
                f"tensor {name} {list(tensor.shape)} does not belong to the model, which "
                f"expects {self.expected.get(name)}"
            )
        if self.shard and self.shard_bytes + tensor.nbytes > MAX_SHARD_BYTES:
            self._write_shard()
        self.added[name] = tensor.shape
        self.shard[name] = tensor
        self.shard_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def add_file(self, name: str, content: bytes | Path) -> None:
        """Write one more file beside the weights: bytes, or a copy of a path."""
        target = safe_join(self.partial.folder, name)
        data = content if isinstance(content, bytes) else content.read_bytes()
        with self._writing():
            target.write_bytes(data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
        except BaseException as raised:
            error = raised
            raise
        finally:
            # Nothing may still write into a folder that goes, or is another run's.
            self._flush.shutdown()
            if error is not None:
                self._leave(error)

    def _leave(self, error: BaseException) -> None:
        """Keep for the next run what it can use, where it could do without the error."""
        stopped = not isinstance(error, Exception)
        failed = isinstance(error, OSError) or isinstance(error.__context__, OSError)
        if not stopped and not failed:
            self.partial.remove()
        elif self.partial.leave():
            size = sum(shard["bytes"] for shard in self.partial.shards.values())
            error.add_note(
                f"{size / 1e6:,.1f} MB of the model stay in {str(self.partial.folder)!r}: "
                f"the same command goes on there, any other that writes "
                f"{str(self.out)!r} clears them away"
            )

    def _write_shard(self) -> None:
        """Write the tensors that are held, unless a killed run has done so."""
        tensors, self.shard, self.shard_bytes = in_order(self.shard), {}, 0
        self.shards.append(list(tensors))
        name = _shard(len(self.shards))
        header = hashlib.sha256(header_of(tensors)).hexdigest()
        if self.partial.shards.get(name, {}).get("header") == header:
            for _ in tensors:
                self._tell()
            return
        path = self.partial.folder / name
        with self._writing():
            digest = write_shard(path, tensors, self._tell)
            size = path.stat().st_size
            self._settle()
            shard = {"bytes": size, "sha256": digest, "header": header}
            # The disk takes it while the next one is made.
            self._flushed = self._flush.submit(self.partial.record, name, shard)

    def _settle(self) -> None:
        """Wait until every shard that was written is on the disk."""
        if self._flushed is not None:
            self._flushed.result()

    def _tell(self) -> None:
        self.written += 1
        if self.progress:
            self.progress(self.written, len(self.expected))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Says in one line that the disk does not take it."""
        try:
            yield
        except OSError as error:
            way_out = (
                "is the disk full?"
                if error.errno in FULL
                else "check its disk and who may write there"
            )
            raise CheckpointError(
                f"{self.out} cannot be written ({error.strerror or error}); {way_out}"
            ) from None

    def _finish(self) -> None:
        check_names(self.added, self.expected, self.out)
        self._write_shard()
        with self._writing():
            self._settle()
        names = self._last_names()
        config = json.dumps(self.config.to_dict(), indent=2)
        self.add_file(CONFIG, config.encode() + b"\n")
        if len(names) > 1:
            self.add_file(INDEX, self._index(names.values()))
        with self._writing():
            files = {last: self._file(name) for name, last in names.items()}
            for path in self.partial.folder.iterdir():
                if path.name not in (JOURNAL, LOCK, *names):
                    fsync(path)
                    size = path.stat().st_size
                    files[path.name] = {"bytes": size, "sha256": sha256(path)}
            manifest = {
                "format_version": FORMAT_VERSION,
                "written_by": f"mm1-mlx {version('mm1-mlx')}",
                "source": self.source,
                "files": dict(sorted(files.items())),
            }
            replace_json(self.partial.folder / MANIFEST, manifest)
            self.partial.rename(names)
        self.partial.publish(overwrite=self.overwrite)

    def _last_names(self) -> dict[str, str]:
        """By what a shard is called so far, its name now that their number is known.

        Hugging Face's.
        """
        count = len(self.shards)
        if count == 1:
            return {_shard(1): "model.safetensors"}
        numbers = range(1, count + 1)
        return {_shard(i): f"model-{i:05}-of-{count:05}.safetensors" for i in numbers}

    def _index(self, names: Iterable[str]) -> bytes:
        """The file that says which shard of these holds a tensor."""
        weight_map: dict[str, str] = {}
        for name, tensors in zip(names, self.shards, strict=True):
            weight_map.update(dict.fromkeys(tensors, name))
        metadata = {"total_size": self.total_bytes}
        content = {"metadata": metadata, "weight_map": weight_map}
        return json.dumps(content, indent=2).encode() + b"\n"

    def _file(self, name: str) -> dict[str, Any]:
        """What the manifest says of a shard."""
        shard = self.partial.shards[name]
        return {key: shard[key] for key in ("bytes", "sha256")}


def _shard(number: int) -> str:
    """What a shard is called until their number is known."""
    return f"shard-{number}.safetensors"


def check_place(out: Path, *, overwrite: bool, sources: Iterable[Path] = ()) -> None:
    """Pass only where a model may be written.

    Args:
        out: the place.
        overwrite: whether a model that is there may be replaced.
        sources: the folders that it is made from.

    Raises:
        CheckpointError: something is there that must not be replaced, or nothing may be
            written.
    """
    check_apart(out, sources)
    if not out.exists():
        above = _above(out)
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise CheckpointError(
                f"{str(out)!r} cannot be made, for {str(above)!r} is not a folder that "
                "can be written in; choose another place"
            )
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


def check_apart(out: Path, sources: Iterable[Path]) -> None:
    """Pass only where writing leaves the folders whole that are read.

    Raises:
        CheckpointError: ``out`` is one of them, holds it or lies in it.
    """
    for source in filter(Path.exists, sources):
        if _holds(source, out) or _holds(out, source):
            raise CheckpointError(
                f"{str(out)!r} is, holds or lies in {str(source)!r}, which it is to be "
                "made from; choose another place"
            )


def _holds(folder: Path, path: Path) -> bool:
    """Whether a path is a folder or lies in it, by whatever names the two are called."""
    if not folder.exists():
        return False
    # Not by their names: a disk may not tell capitals from small letters.
    place = path.resolve()
    return any(x.exists() and x.samefile(folder) for x in (place, *place.parents))


def check_space(out: Path, size: int) -> None:
    """Pass only where the disk has room for so many bytes.

    What a killed run left counts as room: it is used, or cleared away.

    Raises:
        CheckpointError: it has not.
    """
    free, left = shutil.disk_usage(_above(out)).free, beside(out.resolve(), "partial")
    # Gone meanwhile, if another run is at work there.
    with suppress(FileNotFoundError):
        free += sum(path.stat().st_size for path in left.iterdir())
    if size > free:
        raise CheckpointError(
            f"{str(out)!r} needs {size / 1e6:,.1f} MB, but its disk has {free / 1e6:,.1f} "
            "MB free; name a folder on another disk, or pass --bits 4"
        )


def _above(out: Path) -> Path:
    """The nearest folder above a path that is there."""
    return next(x for x in out.absolute().parents if x.exists())


def _is_model(path: Path) -> bool:
    """Whether a folder is a model of ours, of whatever version."""
    try:
        values = read_json(path / CONFIG)
        read_manifest(path)
    except (CheckpointError, OSError):
        return False
    return isinstance(values, dict) and values.get("model_type") == MODEL_TYPE
