"""The one on-disk format: a folder that is either whole or not there.

``config.json``, ``model*.safetensors`` (with an index where there are several), the
tokenizer's files, and ``manifest.json``: format version, source, size and sha256 of
every file. The manifest is written last and the folder renamed into place, so a killed
run leaves nothing that loads. Attribute path = tensor name; no name is translated here.
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
import mlx.nn as nn

from mm1_mlx.config import MODEL_TYPE, MM1Config
from mm1_mlx.errors import CheckpointError
from mm1_mlx.files import fsync, read_json, read_shard, safe_join, sha256
from mm1_mlx.models import MM1

FORMAT_VERSION = 1
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
MANIFEST = "manifest.json"
MAX_SHARD_BYTES = 1_000_000_000


def model_shapes(
    config: MM1Config, packed: Collection[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model, without allocating it.

    Raises:
        CheckpointError: one of the ``packed`` modules cannot be so.
    """
    model = build_model(config, packed)
    return _shapes(model.tensors())


def build_model(config: MM1Config, packed: Collection[str]) -> MM1:
    """A model of which exactly these modules are packed, as the config says how.

    Nothing is computed: the weights are lazy until others take their places.

    Raises:
        CheckpointError: a module is not one of the model's that can be packed.
    """
    model, left = MM1(config), set(packed)
    if not left:
        return model
    if config.quantization is None:
        raise CheckpointError(
            f"{sorted(left)[:5]} are packed, but config.json does not say how"
        )

    def chosen(path: str, module: nn.Module) -> bool:
        known = path in left and hasattr(module, "to_quantized")
        left.difference_update([path] if known else [])
        return known

    try:
        nn.quantize(model, **config.quantization.to_dict(), class_predicate=chosen)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"config.json packs weights in a way that does not fit them ({reason})"
        ) from None
    if left:
        raise CheckpointError(
            f"{len(left)} packed module(s) unknown, e.g. {sorted(left)[:5]}; config.json "
            "and the weights do not belong together"
        )
    return model


def cast_to(dtype: mx.Dtype, tensor: mx.array) -> mx.array:
    """The tensor in ``dtype``; packed integers stay what they are."""
    return tensor.astype(dtype) if mx.issubdtype(tensor.dtype, mx.floating) else tensor


def check_names(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    where: object,
) -> None:
    """Pass only if names and shapes are exactly the model's.

    Raises:
        CheckpointError: names the tensors that are unknown, missing or misshapen.
    """
    unknown = sorted(set(found) - set(expected))
    missing = sorted(set(expected) - set(found))
    for names, verb in ((unknown, "unknown"), (missing, "missing")):
        if names:
            raise CheckpointError(
                f"{where}: {len(names)} tensor(s) {verb}, e.g. {names[:5]}; "
                "config.json and the weights do not belong together"
            )
    for name, shape in found.items():
        if shape != expected[name]:
            raise CheckpointError(
                f"{where}: {name} has shape {list(shape)}, config.json says "
                f"{list(expected[name])}; they do not belong together"
            )


def foreign(name: object, kind: object) -> CheckpointError:
    """What is said of a model that is in another format."""
    return CheckpointError(
        f"{name} is a {kind!r} model, not {MODEL_TYPE!r}; convert it with "
        f"'mm1 convert {name} OUT'"
    )


def load_config(path: Path) -> MM1Config:
    """The config of a model folder.

    Raises:
        CheckpointError: the folder is not there, not finished, or not in our format.
        ConfigError: its config.json does not describe a model.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"model folder {str(path)!r} does not exist; check its name"
        )
    values = read_json(path / CONFIG)
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != MODEL_TYPE:
        raise foreign(path, kind)
    version = read_manifest(path).get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r}, this program reads "
            f"{FORMAT_VERSION}; convert it again"
        )
    return MM1Config.from_dict(values)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        CheckpointError: there is none, or it lists no files.
    """
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{path} has no {MANIFEST}, so it is not a finished model; convert it again"
        )
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{path / MANIFEST} lists no files; convert it again")
    return manifest


def load_manifest(path: Path) -> dict[str, Any]:
    """The manifest, once every file it lists has the size it says.

    Raises:
        CheckpointError: a file is missing or has another size.
    """
    manifest = read_manifest(path)
    for name, record in manifest["files"].items():
        file = safe_join(path, name)
        size = file.stat().st_size if file.is_file() else None
        if not isinstance(record, dict) or size != record.get("bytes"):
            have = "is missing" if size is None else f"has {size:,} bytes"
            raise CheckpointError(
                f"{file} {have}, the manifest says {_bytes(record)}; "
                "copy or convert the model again"
            )
    return manifest


def _bytes(record: Any) -> str:
    size = record.get("bytes") if isinstance(record, dict) else None
    return f"{size:,}" if isinstance(size, int) else "nothing readable"


def verify_digests(path: Path) -> int:
    """Compare every file with its sha256 in the manifest; the number of files.

    Raises:
        CheckpointError: names the file whose bytes changed.
    """
    files = load_manifest(path)["files"]
    for name, record in files.items():
        if sha256(path / name) != record.get("sha256"):
            raise CheckpointError(
                f"{path / name} does not have the sha256 of the manifest; "
                "copy or convert the model again"
            )
    return len(files)


def device_dtype() -> mx.Dtype | None:
    """What weights are best cast to here, None for nothing: a CPU's halves are slow."""
    return mx.float32 if mx.default_device() == mx.cpu else None


def load_model(path: Path, dtype: mx.Dtype | None = None) -> MM1:
    """The model of a folder, its weights in ``dtype`` (as stored if None).

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the config.
        ConfigError: config.json does not describe a model.
    """
    config = load_config(path)
    files = load_manifest(path)["files"]
    weights: dict[str, mx.array] = {}
    for name in sorted(files):
        if name.endswith(".safetensors"):
            shard = read_shard(safe_join(path, name))
            if twice := sorted(set(weights) & set(shard)):
                raise CheckpointError(f"{path}: {twice[:5]} stand in two shards")
            weights.update(shard)
    packed = [k.removesuffix(".scales") for k in weights if k.endswith(".scales")]
    model = build_model(config, packed if config.quantization else ())
    expected = model.tensors()
    check_names(_shapes(weights), _shapes(expected), path)
    for name, tensor in weights.items():
        # Only packed integers are of one type alone.
        floating = mx.issubdtype(expected[name].dtype, mx.floating)
        kind = mx.floating if floating else expected[name].dtype
        if not mx.issubdtype(tensor.dtype, kind):
            raise CheckpointError(
                f"{path}: {name} holds {tensor.dtype}, expected "
                f"{'floating point' if floating else kind}"
            )
    if dtype is not None:
        weights = {k: cast_to(dtype, v) for k, v in weights.items()}
    model.load_weights(list(weights.items()))
    model.eval()
    # Constants too: another thread could not evaluate them on this one's stream.
    mx.eval(model.state)
    return model


def _shapes(tensors: Mapping[str, mx.array]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


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
