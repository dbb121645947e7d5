"""The one on-disk format: a folder that is either whole or not there.

``config.json``, ``model*.safetensors`` (with an index where there are several), the
tokenizer's files, and ``manifest.json``: format version, source, size and sha256 of
every file. The manifest is written last and the folder renamed into place, so a killed
run leaves nothing that loads. Attribute path = tensor name; no name is translated here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from mm1_mlx.budget import check_load
from mm1_mlx.config import MODEL_TYPE, MM1Config, Packing, QuantizationConfig
from mm1_mlx.errors import CheckpointError
from mm1_mlx.files import check_shard, read_json, read_shard, safe_join, sha256
from mm1_mlx.folders import MODEL_CONFIG, mistaken
from mm1_mlx.models import MM1
from mm1_mlx.models.linear import keep_unpacked, pack
from mm1_mlx.room import unswapped

FORMAT_VERSION = 1
CONFIG = MODEL_CONFIG
INDEX = "model.safetensors.index.json"
MANIFEST = "manifest.json"

# Of the memory that is free, what a CPU's unpacked weights may take: who packs a large
# model wants its memory back. From swap they would come slower than they are unpacked.
UNPACKED_SHARE = 0.1
# A type, a function of the stored one, or None for the stored one.
Precision = mx.Dtype | Callable[[mx.Dtype], mx.Dtype] | None
Changed = Callable[[MM1, Mapping[str, mx.array]], dict[str, mx.array]]


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
    ways = config.quantization
    if ways is None:
        raise CheckpointError(
            f"{sorted(left)[:5]} are packed, but config.json does not say how"
        )
    _check_ways(ways, left)

    def packed_as_said(path: str, module: nn.Module) -> nn.Module:
        if path not in left or not hasattr(module, "to_quantized"):
            return module
        left.discard(path)
        return pack(module, ways.way(path))

    try:
        leaves = tree_map_with_path(
            packed_as_said, model.leaf_modules(), is_leaf=nn.Module.is_module
        )
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"config.json packs weights in a way that does not fit them ({reason})"
        ) from None
    model.update_modules(leaves)
    if left:
        raise CheckpointError(
            f"{len(left)} packed module(s) unknown, e.g. {sorted(left)[:5]}; config.json "
            "and the weights do not belong together"
        )
    return model


def _check_ways(quantization: QuantizationConfig, packed: Collection[str]) -> None:
    """Pass only if what is said to be packed in a way of its own is packed."""
    absent = [path for path, _ in quantization.modules if path not in packed]
    if absent:
        raise CheckpointError(
            f"config.json says how {absent[:5]} are packed, which the weights do not "
            "hold packed; they do not belong together"
        )


def cast_to(dtype: mx.Dtype, tensor: mx.array) -> mx.array:
    """The tensor in ``dtype``; packed integers stay what they are."""
    return tensor.astype(dtype) if mx.issubdtype(tensor.dtype, mx.floating) else tensor


def cast_overflowing(dtype: mx.Dtype, tensor: mx.array) -> tuple[mx.array, mx.array]:
    """The tensor in ``dtype``, and whether a finite number of it became infinite."""
    cast = cast_to(dtype, tensor)
    if not mx.issubdtype(tensor.dtype, mx.floating) or (
        mx.finfo(cast.dtype).max >= mx.finfo(tensor.dtype).max
    ):
        return cast, mx.array(False)
    return cast, mx.any(mx.isinf(cast) & ~mx.isinf(tensor))


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
    if not (path / CONFIG).is_file() and (said := mistaken(path, "model")):
        raise CheckpointError(said)
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


def packed_on_disk(path: Path, config: MM1Config) -> dict[str, Packing]:
    """How the modules of a model folder are packed, by path, from its files' headers.

    Raises:
        CheckpointError: a file of weights is missing or damaged.
    """
    if config.quantization is None:
        return {}
    names = (
        name
        for file in load_manifest(path)["files"]
        if file.endswith(".safetensors")
        for name in check_shard(safe_join(path, file))
    )
    packed = [
        name.removesuffix(".scales") for name in names if name.endswith(".scales")
    ]
    return {module: config.quantization.way(module) for module in packed}


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


def device_dtype(stored: mx.Dtype) -> mx.Dtype:
    """What weights that are stored so are best computed in here."""
    kinds = device_dtypes()
    return stored if stored in kinds else kinds[0]


def device_dtypes() -> tuple[mx.Dtype, ...]:
    """The types that the default device computes quickly, the one to prefer first.

    A CPU's halves are slow, and the GPUs of M1 and M2 have no bfloat16.
    """
    if mx.default_device() == mx.cpu:
        return (mx.float32,)
    # M1 is generation 13, M3 15; other makers' names have none.
    found = re.search(r"applegpu_g(\d+)", str(mx.device_info().get("architecture")))
    if found and int(found[1]) < 15:
        return (mx.float16,)
    return mx.bfloat16, mx.float16


def load_model(
    path: Path,
    dtype: Precision = None,
    way_out: str | None = None,
    group: mx.distributed.Group | None = None,
    changed: Changed | None = None,
) -> MM1:
    """The model of a folder, its weights in ``dtype`` (as stored if None).

    Args:
        path: the folder.
        dtype: a type, or a function of the type that is stored, such as
            ``device_dtype``: where a weight is too large for what that gives, all are
            bfloat16, which holds any.
        way_out: what to do where memory has no room, by default to quantize the model.
        group: processes that each keep a part of the decoder's layers; no other part is
            held at once.
        changed: of the model, its weights not yet there, and the weights as stored, those
            that are others: ``Adapters.changed``.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the config; a
            weight is too large for ``dtype``; or the device has not the memory for it.
        ConfigError: config.json does not describe a model.
    """
    config = load_config(path)
    files = load_manifest(path)["files"]
    weights = _read_weights(path, files)
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
    overflows: dict[str, mx.array] = {}
    others = changed(model, weights) if changed else {}
    if dtype is not None:
        kind = dtype if isinstance(dtype, mx.Dtype) else dtype(_stored(weights))
        for name in weights:
            tensor = others.pop(name, weights[name])
            weights[name], overflows[name] = cast_overflowing(kind, tensor)
    for name, tensor in others.items():
        weights[name] = tensor.astype(weights[name].dtype)
    model.load_weights(list(weights.items()))
    del weights, others
    if group is not None:
        model.shard(group)
    check_load(model.tensors(), path, config, way_out)
    # Popped, so that each tensor is cast by itself, and what it was cast from freed.
    large = [name for name in list(overflows) if overflows.pop(name).item()]
    if large and not isinstance(dtype, mx.Dtype):
        del model
        return load_model(path, mx.bfloat16, way_out, group, changed)
    if large:
        raise CheckpointError(
            f"{path}: {len(large)} tensor(s) hold numbers too large for {kind}, e.g. "
            f"{large[:5]}; load them as bfloat16"
        )
    _evaluate(list(model.tensors().values()))
    return settle(model)


def _evaluate(tensors: Sequence[mx.array]) -> None:
    """Read and cast tensors, at a time no more than the largest has bytes.

    Of all together mlx would hold what a dozen are cast from.
    """
    largest = max((x.nbytes for x in tensors), default=0)
    group: list[mx.array] = []
    for tensor in tensors:
        if sum(x.nbytes for x in group) + tensor.nbytes > largest:
            mx.eval(group)
            group = []
        group.append(tensor)
    mx.eval(group)


def settle(model: MM1) -> MM1:
    """The model, its weights held as the device computes them best."""
    model.eval()
    mx.eval(model.state)
    keep_unpacked(model, UNPACKED_SHARE * (unswapped() or 0))
    # Constants too: another thread could not evaluate them on this one's stream.
    mx.eval(model.state)
    return model


def _read_weights(path: Path, files: Iterable[str]) -> dict[str, mx.array]:
    """The tensors of all shards, lazily.

    Nobody else holds them: what was cast is freed at once.
    """
    weights: dict[str, mx.array] = {}
    for name in sorted(files):
        if name.endswith(".safetensors"):
            shard = read_shard(safe_join(path, name))
            if twice := sorted(set(weights) & set(shard)):
                raise CheckpointError(f"{path}: {twice[:5]} stand in two shards")
            weights.update(shard)
    return weights


def _stored(weights: Mapping[str, mx.array]) -> mx.Dtype:
    """The type of most numbers, of packed weights that of their scales."""
    sizes: Counter[mx.Dtype] = Counter()
    for tensor in weights.values():
        if mx.issubdtype(tensor.dtype, mx.floating):
            sizes[tensor.dtype] += tensor.size
    return sizes.most_common(1)[0][0] if sizes else mx.float32


def _shapes(tensors: Mapping[str, mx.array]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
