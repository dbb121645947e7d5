"""An adapter on disk: a folder of two small files, read as strictly as a model.

``adapter.safetensors`` holds low-rank matrices by the paths of their layers, and by their
own names the weights that were trained in full; ``adapter_config.json`` says the rest and
the digest of the other. The folder appears when it is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mm1_mlx import hub
from mm1_mlx.adapters.attach import LEAVES
from mm1_mlx.adapters.config import MAX_RANK, MAX_SCALE, AdapterConfig
from mm1_mlx.checkpoint import read_manifest
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.files import fsync, read_json, read_shard, replace_json, safe_join, sha256
from mm1_mlx.folders import ADAPTER_CONFIG, mistaken, user_path
from mm1_mlx.models import MM1
from mm1_mlx.models.linear import outer_paths
from mm1_mlx.partial import Partial
from mm1_mlx.section import Section

FORMAT_VERSION = 1
CONFIG = ADAPTER_CONFIG
WEIGHTS = "adapter.safetensors"
# In ``training``: the resolution mode of the pictures, where it was not the model's own.
RESOLUTION = "resolution"
KNOWN = ("format_version", "adapter", "base", "scales", "training", "sha256")


@dataclass(frozen=True, kw_only=True)
class Base(Section):
    """The model that an adapter was trained on.

    Attributes:
        name: what people call it.
        digest: of its files, sha256.
    """

    name: str
    digest: str


def base_of(path: Path) -> Base:
    """What a model folder is called, and the digest of what its manifest lists.

    Raises:
        CheckpointError: it has no manifest.
    """
    manifest = read_manifest(path)
    text = json.dumps(manifest["files"], sort_keys=True)
    return Base(
        name=_name(manifest.get("source")) or path.resolve().name,
        digest=hashlib.sha256(text.encode()).hexdigest(),
    )


def _name(source: Any) -> str | None:
    """What a manifest calls a model: by itself, or by what it was converted from."""
    known: Any = source if isinstance(source, dict) else {}
    parts = known.get("parts")
    records = parts.values() if isinstance(parts, dict) else ()
    names = [x.get("source") for x in records if isinstance(x, dict)]
    named = dict.fromkeys(n for n in names if isinstance(n, str))
    name = known.get("name") or " + ".join(named)
    packed = known.get("quantized")
    recipe = packed.get("recipe") if isinstance(packed, dict) else None
    if not isinstance(name, str) or not name:
        return None
    return f"{name}, {recipe}" if isinstance(recipe, str) else name


@dataclass(frozen=True)
class Adapter:
    """Low-rank matrices, and weights trained in full, with what belongs to them.

    Attributes:
        config: how they were put into the model.
        tensors: by name, as on disk.
        base: the model that they were trained on.
        scales: of layers whose scale is another than the config's, by path.
        training: what is to be known of the training, as JSON values.
        name: what to call it in errors.
    """

    config: AdapterConfig
    tensors: Mapping[str, mx.array]
    base: Base
    scales: Mapping[str, float] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    name: str = "adapter"

    @classmethod
    def of(
        cls,
        model: MM1,
        config: AdapterConfig,
        base: Base,
        training: Mapping[str, Any] | None = None,
    ) -> Self:
        """Everything that is trainable in a model that ``attach`` has prepared."""
        return cls(config, tensors_of(model), base, training=training or {})

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The paths of the layers with low-rank matrices."""
        names = (n.rpartition(".") for n in self.tensors)
        return tuple(sorted(path for path, _, leaf in names if leaf == "lora_a"))

    @cached_property
    def full(self) -> tuple[str, ...]:
        """The names of the weights that were trained in full."""
        held = {f"{path}.{leaf}" for path in self.layers for leaf in LEAVES}
        return tuple(sorted(set(self.tensors) - held))

    @cached_property
    def digest(self) -> str:
        """Of all that decides what it does to a model: sha256, in hexadecimal."""
        said = [self.config.to_dict(), dict(self.scales)]
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
            flat = mx.contiguous(tensor).reshape(-1).view(mx.uint8)
            digest.update(memoryview(cast(Any, flat)))
        return digest.hexdigest()

    def scale(self, path: str) -> float:
        """What the product of a layer's matrices is multiplied by."""
        return self.scales.get(path, self.config.scale)

    def rank(self, path: str) -> int:
        """The inner width of a layer's matrices."""
        a = self.tensors[f"{path}.lora_a"]
        return a.shape[1]

    @property
    def resolution(self) -> str | None:
        """The mode of the pictures that it learned from, None for the model's own."""
        mode: str | None = self.training.get(RESOLUTION)
        return mode

    @property
    def nbytes(self) -> int:
        """What its weights take."""
        return sum(x.nbytes for x in self.tensors.values())


def tensors_of(model: MM1) -> dict[str, mx.array]:
    """What is trainable in a model, by the names that an adapter gives it.

    Those are the names that the model's weights have on disk, whether a layer has
    low-rank matrices beside it or not.
    """
    outer = outer_paths(model)
    found = cast(list[tuple[str, mx.array]], tree_flatten(model.trainable_parameters()))
    tensors = {}
    for name, tensor in found:
        path, _, leaf = name.rpartition(".")
        tensors[f"{outer.get(path, path)}.{leaf}".lstrip(".")] = tensor
    return tensors


def save(folder: Path, adapter: Adapter, *, overwrite: bool = False) -> None:
    """Write an adapter's folder, which appears when it is whole.

    Raises:
        CheckpointError: something is there that must not be replaced, or the place
            cannot be written.
    """
    out = folder.resolve()
    if out.exists() and not (overwrite and (out / CONFIG).is_file()):
        raise CheckpointError(
            f"{str(folder)!r} already exists"
            + ("; choose another name or pass --overwrite" if not overwrite else
               " and is no adapter, so it will not be overwritten; choose another name")
        )  # fmt: skip

    def record(weights: Path) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "adapter": adapter.config.to_dict(),
            "base": adapter.base.to_dict(),
            "scales": dict(adapter.scales),
            "training": dict(adapter.training),
            "sha256": sha256(weights),
        }

    write(folder, WEIGHTS, "mlx", adapter.tensors, record, overwrite=overwrite)


def write(
    folder: Path,
    name: str,
    layout: str,
    tensors: Mapping[str, mx.array],
    record: Callable[[Path], Mapping[str, Any]],
    *,
    overwrite: bool = False,
) -> None:
    """Put a folder of tensors and an adapter_config.json in its place, at once.

    Args:
        folder: its place.
        name: of the tensors' file.
        layout: which program's its tensors are laid out for, as safetensors says it.
        tensors: what it holds.
        record: makes the content of adapter_config.json, of that file.
        overwrite: whether what is there is replaced.

    Raises:
        CheckpointError: the place cannot be written.
    """
    partial = Partial(folder.resolve(), None)
    try:
        partial.open()
        try:
            weights = partial.folder / name
            mx.save_safetensors(str(weights), dict(tensors), {"format": layout})
            fsync(weights)
            replace_json(partial.folder / CONFIG, record(weights))
            partial.publish(overwrite=overwrite)
        except BaseException:
            partial.remove()
            raise
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{str(folder)!r} cannot be written ({error}); is the disk full?"
        ) from None


def load(source: str | Path) -> Adapter:
    """The adapter of a folder or a hub repository.

    Raises:
        CheckpointError: there is none, it is damaged, or it is in another format.
        ConfigError: its adapter_config.json does not describe one.
    """
    folder = find(source)
    if not (folder / CONFIG).is_file() and (said := mistaken(folder, "adapter")):
        raise CheckpointError(said)
    record = read_json(safe_join(folder, CONFIG))
    if not isinstance(record, dict) or set(record) != set(KNOWN):
        raise _foreign(folder, record)
    if record["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has adapter format version {record['format_version']!r:.80}, this "
            f"program reads {FORMAT_VERSION}; save it again"
        )
    scales, training = record["scales"], record["training"]
    if not isinstance(scales, dict) or not isinstance(training, dict):
        raise ConfigError(f"{folder / CONFIG}: scales and training must be objects")
    if not isinstance(training.get(RESOLUTION), str | None):
        raise ConfigError(
            f"{folder / CONFIG}: resolution {training[RESOLUTION]!r:.80} is no mode's name"
        )
    for path, scale in scales.items():
        if type(scale) not in (int, float) or not 0 < abs(scale) <= MAX_SCALE:
            raise ConfigError(
                f"{folder / CONFIG}: scale {scale!r:.80} of {path!r:.80} is not a number "
                f"up to {MAX_SCALE:g}"
            )
    config, base = (
        kind.from_dict(record[key])
        for kind, key in ((AdapterConfig, "adapter"), (Base, "base"))
    )
    weights = safe_join(folder, WEIGHTS)
    tensors = read_shard(weights)
    if sha256(weights) != record["sha256"]:
        raise CheckpointError(
            f"{weights} does not have the sha256 of {CONFIG}; copy the adapter again"
        )
    name = str(source)
    mx.eval(tensors)
    adapter = Adapter(
        cast(Any, config), tensors, cast(Any, base), scales, training, name
    )
    check(adapter)
    return adapter


def find(source: str | Path) -> Path:
    """The folder of an adapter named as ``load`` takes it.

    Raises:
        CheckpointError: there is no such folder and no such hub repository.
    """
    name = str(source)
    path = user_path(name)
    if path.is_dir():
        return path
    if not path.exists() and hub.is_repository(name):
        return hub.download_files(name, (CONFIG, WEIGHTS))
    raise CheckpointError(
        f"adapter {name!r} is not a folder; give the folder of an adapter, or a "
        "repository (OWNER/NAME)"
    )


def _foreign(folder: Path, record: Any) -> CheckpointError:
    fields = set(record) if isinstance(record, dict) else set()
    if "peft_type" in fields:
        return CheckpointError(
            f"{folder} is a PEFT adapter; bring it over with 'mm1 adapter import "
            f"{folder} OUT --model MODEL'"
        )
    return CheckpointError(
        f"{folder / CONFIG} has the fields {sorted(map(str, fields))[:8]}, expected "
        f"{list(KNOWN)}; it is not an adapter of this program"
    )


def check(adapter: Adapter) -> None:
    """Pass only if pairs are whole, ranks within bounds and all numbers finite.

    Raises:
        CheckpointError: names what is not.
    """
    tensors = adapter.tensors
    lost = [p for p in adapter.layers if f"{p}.lora_b" not in tensors]
    lost += [n for n in adapter.full if n.rpartition(".")[2] in LEAVES]
    if lost:
        raise CheckpointError(
            f"{adapter.name}: {lost[0]!r:.120} is half of a pair; copy the adapter again"
        )
    for path in adapter.layers:
        a = tensors[f"{path}.lora_a"]
        if a.ndim not in (2, 3) or not 1 <= adapter.rank(path) <= MAX_RANK:
            raise CheckpointError(
                f"{adapter.name}: {path!r:.120} has matrices of shape {list(a.shape)}, "
                f"whose rank is not within 1..{MAX_RANK}"
            )
    if unknown := sorted(set(adapter.scales) - set(adapter.layers)):
        raise CheckpointError(
            f"{adapter.name}: a scale is said for {unknown[0]!r:.120}, which has no "
            "low-rank matrices; copy the adapter again"
        )
    for name, tensor in tensors.items():
        if not mx.issubdtype(tensor.dtype, mx.floating):
            raise CheckpointError(
                f"{adapter.name}: {name!r:.120} holds {tensor.dtype}, expected floating "
                "point"
            )
        if not mx.all(mx.isfinite(tensor)).item():
            raise CheckpointError(
                f"{adapter.name}: {name!r:.120} holds a number that is not finite; the "
                "training has failed, take an earlier checkpoint"
            )
