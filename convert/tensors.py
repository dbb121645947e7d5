"""The tensors in a folder's weight files: what their headers say, and their values."""

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np

from mm1_mlx.errors import CheckpointError
from mm1_mlx.files import KINDS, read_header, safe_join

from .shards import unpickle, weight_files
from .step import ALL

FLOATS = {mx.float16, mx.bfloat16, mx.float32}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a shard: what the header says of it, and its values when asked for."""

    path: Path
    shape: tuple[int, ...]
    dtype: mx.Dtype
    # Where in the file its bytes begin.
    start: int

    def read(self, rows: slice = ALL) -> mx.array:
        """Its values, or those of some places along the first axis; the rest stay unread.

        Raises:
            CheckpointError: the file is no longer what it was.
        """
        shape, first = self.shape, 0
        if shape:
            first, end, _ = rows.indices(shape[0])
            shape = (max(end - first, 0), *shape[1:])
        width = prod(self.shape[1:]) * self.dtype.size
        count = prod(shape) * self.dtype.size
        try:
            data = np.fromfile(
                self.path, np.uint8, count, offset=self.start + first * width
            )
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read ({error})") from None
        if data.size != count:
            raise CheckpointError(
                f"{self.path} became shorter while it was read; get it again"
            )
        return mx.array(data).view(self.dtype).reshape(shape)


def tensors_in(folder: Path, stack: ExitStack, *inside: str) -> dict[str, TensorInfo]:
    """The tensors of a folder's weight files, pickles included.

    Args:
        folder: the checkpoint.
        stack: removes what pickles were unpacked to.
        inside: the folder in it that is meant, and not the checkpoint's own.

    Raises:
        CheckpointError: a shard is missing, damaged, or not allowed.
    """
    tensors: dict[str, TensorInfo] = {}
    for path in _shards(folder, stack, *inside):
        for name, entry in read_header(path).items():
            if name in tensors:
                raise CheckpointError(
                    f"{folder.joinpath(*inside)}: tensor {name!r} is there twice"
                )
            if entry.kind not in KINDS:
                raise CheckpointError(
                    f"{path} cannot be read: tensor {name!r} is of the unsupported dtype "
                    f"{entry.kind}"
                )
            kind = KINDS[entry.kind]
            tensors[name] = TensorInfo(path, entry.shape, kind, entry.start)
    return tensors


def _shards(folder: Path, stack: ExitStack, *inside: str) -> list[Path]:
    names = weight_files(folder, *inside)
    paths = [safe_join(folder, *inside, name) for name in names]
    if all(name.endswith(".safetensors") for name in names):
        return paths
    scratch = tempfile.TemporaryDirectory(prefix="mm1-convert-")
    return unpickle(paths, Path(stack.enter_context(scratch)))
