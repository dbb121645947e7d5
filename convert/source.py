"""Where weights come from: a local folder or a hub repository, one tensor at a time."""

from contextlib import ExitStack
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

import mlx.core as mx

from mm1_mlx import hub
from mm1_mlx.errors import CheckpointError
from mm1_mlx.pieces import Readable, TensorInfo

from .folder import PACKING, Folder
from .place import SUBFOLDERS, licence_of, local_folder
from .shards import BIN_INDEX, SAFETENSORS_INDEX
from .tensors import FLOATS, tensors_in


class Source(Folder):
    """A foreign checkpoint.

        with Source("llava-hf/llava-1.5-7b-hf") as source:
            source.json("config.json"), source.tensors, source.read(name)

    A hub repository's weights are downloaded when ``tensors`` is first asked for, so
    that its config can be refused before. Files and tensors in ``subfolders`` have the
    folder's name and a slash before theirs.

    Args:
        name: a folder or a hub repository.
        out: the place of the model to be made, beside which pickles are unpacked.

    Raises:
        CheckpointError: there is no such folder or repository, or it cannot be had.
    """

    def __init__(self, name: str, out: Path | None = None) -> None:
        folder = local_folder(name)
        super().__init__(name, folder or hub.download_small(name, SUBFOLDERS))
        self._remote = folder is None
        self.licence = licence_of(folder) if folder else None
        self._unpacked = ExitStack()
        self._out = out

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._unpacked.close()

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
        tensors = tensors_in(self.folder, self._unpacked, out=self._out)
        for folder in self.subfolders:
            inside = tensors_in(self.folder, self._unpacked, folder, out=self._out)
            tensors |= {f"{folder}/{name}": info for name, info in inside.items()}
        return tensors

    def tensor(self, name: str) -> Readable:
        """One tensor, read when it is asked for.

        Raises:
            CheckpointError: it is not there, or neither of a 16- or 32-bit
                floating-point type nor a part of a packed module.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.name} lacks the tensor {name!r}; it is incomplete, get it again"
            )
        if info.dtype not in FLOATS and not self._is_packed(name):
            raise CheckpointError(
                f"{self.name}: tensor {name!r} holds {info.dtype}, not float16, bfloat16 "
                "or float32; convert the unquantized checkpoint"
            )
        return info

    def read(self, name: str) -> mx.array:
        """One tensor's values.

        Raises:
            CheckpointError: there is no such tensor, or none that can be converted.
        """
        return self.tensor(name).read()

    def files(self) -> list[Path]:
        """Every file of the checkpoint."""
        places = (self.folder, *(self.folder / name for name in self.subfolders))
        return sorted(x for place in places for x in place.iterdir() if x.is_file())

    def _is_packed(self, name: str) -> bool:
        """Whether the tensor is one of a packed module's."""
        module = name.rpartition(".")[0]
        return any(self.content.get(key) for key in PACKING) and all(
            f"{module}.{leaf}" in self.tensors for leaf in ("weight", "scales")
        )
