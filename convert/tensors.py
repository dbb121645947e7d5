"""The tensors in a folder's weight files: what their headers say, and their values."""

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mm1_mlx.errors import CheckpointError
from mm1_mlx.files import check_shard, safe_join

from .shards import unpickle, weight_files

FLOATS = {mx.float16, mx.bfloat16, mx.float32}


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of a tensor."""

    path: Path
    # Its name there.
    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype

    def read(self) -> mx.array:
        """Its values: evaluated, so that its file is closed again."""
        tensor = _load(self.path)[self.name]
        mx.eval(tensor)
        return tensor


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
        shapes = check_shard(path)
        arrays = _load(path)
        for name, shape in shapes.items():
            if name in tensors:
                raise CheckpointError(
                    f"{folder.joinpath(*inside)}: tensor {name!r} is there twice"
                )
            tensors[name] = TensorInfo(path, name, shape, arrays[name].dtype)
    return tensors


def _shards(folder: Path, stack: ExitStack, *inside: str) -> list[Path]:
    names = weight_files(folder, *inside)
    paths = [safe_join(folder, *inside, name) for name in names]
    if all(name.endswith(".safetensors") for name in names):
        return paths
    scratch = tempfile.TemporaryDirectory(prefix="mm1-convert-")
    return unpickle(paths, Path(stack.enter_context(scratch)))


def _load(path: Path) -> dict[str, mx.array]:
    try:
        return mx.load(str(path), format="safetensors")  # type: ignore[return-value]
    except RuntimeError as error:  # a kind of number that mlx does not have
        raise CheckpointError(f"{path} cannot be read: {error}") from None
