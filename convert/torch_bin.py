"""PyTorch pickles to safetensors: ``python torch_bin.py SRC... DST``.

Run as a child process, the only place where torch is imported. Every file is loaded
with ``weights_only=True``: a pickle that wants to run code is refused.
"""

import pickle
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A shard is held twice while it is saved.
MAX_SHARD_BYTES = 250_000_000


def main(arguments: list[str]) -> None:
    """Write the tensors of all sources into the folder; any error is one sentence."""
    *sources, folder = arguments
    try:
        import torch
    except ImportError:
        raise SystemExit(
            f"{Path(sources[0]).name} is a PyTorch pickle, which needs torch to read; "
            'run pip install "mm1-mlx[torch]" or use a safetensors checkpoint'
        ) from None
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    count = 0
    for source in sources:
        for shard in _shards(_load(torch, source)):
            count += 1
            try:
                save_file(shard, Path(folder) / f"shard-{count:05}.safetensors")
            except (SafetensorError, OSError) as error:
                raise SystemExit(
                    f"{folder} cannot be written ({error}); what is unpacked needs room "
                    "there, name an OUT on another disk"
                ) from None


def _load(torch: Any, source: str) -> dict[str, Any]:
    try:
        tensors = torch.load(
            source,
            map_location="cpu",
            weights_only=True,
            # Old files are one pickle, which cannot be mapped into memory.
            mmap=zipfile.is_zipfile(source),
        )
    except pickle.UnpicklingError:
        raise SystemExit(
            f"{source} is not a plain PyTorch weight file: it wants to run code or is "
            "damaged; use a safetensors checkpoint"
        ) from None
    except (OSError, MemoryError) as error:
        raise SystemExit(
            f"{source} cannot be read ({error or 'not enough memory'}); check its "
            "permissions and the memory"
        ) from None
    except Exception as error:
        # Whatever a damaged pickle makes torch's reader stumble over.
        reason = str(error).partition("\n")[0].partition(". ")[0]
        reason = reason or type(error).__name__
        raise SystemExit(f"{source} is damaged ({reason}); get it again") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in tensors.values()
    ):
        raise SystemExit(
            f"{source} is not a dict of tensors; use a safetensors checkpoint"
        )
    return tensors


def _shards(tensors: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The tensors in groups of at most ``MAX_SHARD_BYTES``, each with its own memory."""
    shard: dict[str, Any] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > MAX_SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous().clone()
        size += tensor.nbytes
    if shard:
        yield shard


if __name__ == "__main__":
    main(sys.argv[1:])
