"""The tensors in a folder's weight files: what their headers say, and their values."""

from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx

from mm1_mlx.errors import CheckpointError
from mm1_mlx.files import safe_join
from mm1_mlx.pieces import TensorInfo, tensors_of

from .shards import scratch, unpickle, weight_files

FLOATS = {mx.float16, mx.bfloat16, mx.float32}


def tensors_in(
    folder: Path, stack: ExitStack, *inside: str, out: Path | None
) -> dict[str, TensorInfo]:
    """The tensors of a folder's weight files, pickles included.

    Args:
        folder: the checkpoint.
        stack: removes what pickles were unpacked to.
        inside: the folder in it that is meant, and not the checkpoint's own.
        out: the place of the model to be made, beside which pickles are unpacked.

    Raises:
        CheckpointError: a shard is missing, damaged, or not allowed.
    """
    tensors: dict[str, TensorInfo] = {}
    for path in _shards(folder, stack, *inside, out=out):
        found = tensors_of(path)
        if twice := sorted(set(tensors) & set(found)):
            raise CheckpointError(
                f"{folder.joinpath(*inside)}: tensor {twice[0]!r} is there twice"
            )
        tensors |= found
    return tensors


def _shards(
    folder: Path, stack: ExitStack, *inside: str, out: Path | None
) -> list[Path]:
    names = weight_files(folder, *inside)
    paths = [safe_join(folder, *inside, name) for name in names]
    if all(name.endswith(".safetensors") for name in names):
        return paths
    size = sum(path.stat().st_size for path in paths)
    return unpickle(paths, stack.enter_context(scratch(out, size)))
