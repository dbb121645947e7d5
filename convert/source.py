"""Where weights come from: a local folder or a hub repository, one tensor at a time."""

import tempfile
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import mlx.core as mx

from mm1_mlx import hub
from mm1_mlx.errors import CheckpointError
from mm1_mlx.files import check_shard, read_json, safe_join

from .place import SUBFOLDERS, licence_of, local_folder
from .shards import BIN_INDEX, SAFETENSORS_INDEX, unpickle, weight_files, what_lies_in

# Fields of config.json that say how weights are packed.
PACKING = ("quantization", "quantization_config")
FLOATS = {mx.float16, mx.bfloat16, mx.float32}


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of a tensor."""

    path: Path
    # Its name there.
    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype


class Source:
    """A foreign checkpoint.

        with Source("llava-hf/llava-1.5-7b-hf") as source:
            source.json("config.json"), source.tensors, source.read(name)

    A hub repository's weights are downloaded when ``tensors`` is first asked for, so
    that its config can be refused before. Files and tensors in ``subfolders`` have the
    folder's name and a slash before theirs.

    Args:
        name: a folder or a hub repository.

    Raises:
        CheckpointError: there is no such folder or repository, or it cannot be had.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        folder = local_folder(name)
        self._remote = folder is None
        self.folder = folder or hub.download_small(name, SUBFOLDERS)
        self.licence = licence_of(folder) if folder else None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._scratch:
            self._scratch.cleanup()

    def file(self, name: str) -> Path | None:
        """The path of a file, None if there is none of that name."""
        path = safe_join(self.folder, *name.split("/"))
        return path if path.is_file() else None

    @cached_property
    def subfolders(self) -> tuple[str, ...]:
        """Folders with parts of the model: either all that are known, or none."""
        whole = all(self.file(f"{folder}/config.json") for folder in SUBFOLDERS)
        return SUBFOLDERS if whole else ()

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file's object, None if there is no file of that name.

        Raises:
            CheckpointError: the file holds something else.
        """
        path = self.file(name)
        content = read_json(path) if path else {}
        if not isinstance(content, dict):
            raise CheckpointError(f"{self.name}: {name} is not a JSON object")
        return content if path else None

    @property
    def config(self) -> dict[str, Any]:
        """What ``content`` says of the model, not of how its weights are packed.

        Raises:
            CheckpointError: there is none.
        """
        return {k: v for k, v in self.content.items() if k not in PACKING}

    @cached_property
    def content(self) -> dict[str, Any]:
        """The content of config.json, or of open_clip's own where it is the only one.

        Raises:
            CheckpointError: there is none.
        """
        config = self.json("config.json")
        if config is None:
            config = self.json("open_clip_config.json")
        if config is None:
            raise CheckpointError(
                f"{self.name} has no config.json{what_lies_in(self.folder)}"
            )
        return config

    def holds(self, prefix: str) -> bool:
        """Whether a tensor's name begins so; by the index alone where there is one."""
        for name in (SAFETENSORS_INDEX, BIN_INDEX):
            names = (self.json(name) or {}).get("weight_map")
            if isinstance(names, dict):
                return any(str(key).startswith(prefix) for key in names)
        return any(key.startswith(prefix) for key in self.tensors)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of the checkpoint, from the shards' headers.

        Raises:
            CheckpointError: a shard is missing, damaged, or not allowed.
        """
        if self._remote:
            self.folder, self.licence = hub.download(
                self.name,
                pickles=find_spec("torch") is not None,
                folders=self.subfolders,
            )
        tensors = self._tensors_in()
        for folder in self.subfolders:
            inside = self._tensors_in(folder).items()
            tensors |= {f"{folder}/{name}": info for name, info in inside}
        return tensors

    def _tensors_in(self, *inside: str) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for path in self._shards(*inside):
            shapes = check_shard(path)
            arrays = _load(path)
            for name, shape in shapes.items():
                if name in tensors:
                    raise CheckpointError(
                        f"{self.name}: tensor {name!r} is there twice"
                    )
                tensors[name] = TensorInfo(path, name, shape, arrays[name].dtype)
        return tensors

    def read(self, name: str) -> mx.array:
        """One tensor's values: evaluated, so that its file is closed again.

        Raises:
            CheckpointError: it is neither of a 16- or 32-bit floating-point type nor a
                part of a packed module.
        """
        info = self.tensors[name]
        if info.dtype not in FLOATS and not self._is_packed(name):
            raise CheckpointError(
                f"{self.name}: tensor {name!r} holds {info.dtype}, not float16, bfloat16 "
                "or float32; convert the unquantized checkpoint"
            )
        tensor = _load(info.path)[info.name]
        mx.eval(tensor)
        return tensor

    def _is_packed(self, name: str) -> bool:
        """Whether the tensor is one of a packed module's."""
        module = name.rpartition(".")[0]
        return any(self.content.get(key) for key in PACKING) and all(
            f"{module}.{leaf}" in self.tensors for leaf in ("weight", "scales")
        )

    def _shards(self, *inside: str) -> list[Path]:
        names = weight_files(self.folder, *inside)
        paths = [safe_join(self.folder, *inside, name) for name in names]
        if all(name.endswith(".safetensors") for name in names):
            return paths
        self._scratch = self._scratch or tempfile.TemporaryDirectory(
            prefix="mm1-convert-"
        )
        place = Path(self._scratch.name, *(inside or ["own"]))
        place.mkdir()
        return unpickle(paths, place)


def _load(path: Path) -> dict[str, mx.array]:
    try:
        return mx.load(str(path), format="safetensors")  # type: ignore[return-value]
    except RuntimeError as error:  # a kind of number that mlx does not have
        raise CheckpointError(f"{path} cannot be read: {error}") from None
