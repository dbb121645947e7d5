"""Image tokens of pictures that were seen before, by content: in memory, and on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import mlx.core as mx

from mm1_mlx.errors import CheckpointError
from mm1_mlx.files import read_shard
from mm1_mlx.layout import Picture

# About 100 pictures of 576 tokens for a 7B model in half precision.
MAX_BYTES = 512 << 20
MAX_DISK_BYTES = 4 << 30

# Raised when the same weights give other image tokens, or another cache.
NUMERICS = 1

Encode = Callable[[Sequence[Picture]], list[mx.array]]


class FeatureCache:
    """The image tokens [T_i, D] of pictures, those used last kept longest.

    Args:
        encode: makes the image tokens of pictures that are not here.
        fingerprint: of everything that decides them beside the picture: weights, config.
        folder: where they are kept on disk too, or None.
        max_bytes: how much memory they may take.
        max_disk_bytes: how much of the disk.
    """

    def __init__(
        self,
        encode: Encode,
        fingerprint: str,
        folder: Path | None = None,
        *,
        max_bytes: int = MAX_BYTES,
        max_disk_bytes: int = MAX_DISK_BYTES,
    ) -> None:
        self._encode = encode
        self._fingerprint = fingerprint
        self._disk = _Disk(folder, max_disk_bytes) if folder else None
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, mx.array] = OrderedDict()
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        """The memory that the kept image tokens take."""
        return self._bytes

    def __call__(
        self,
        pictures: Sequence[Picture],
        between: Callable[[], None] | None = None,
    ) -> list[mx.array]:
        """The image tokens [T_i, D] of every picture; equal ones are encoded once.

        Args:
            pictures: what is seen.
            between: called behind every picture that is encoded, for whoever cannot
                wait for all of them; what it raises ends this, and they stay known.
        """
        keys = [self._key(picture) for picture in pictures]
        found = {key: tokens for key in keys if (tokens := self._find(key)) is not None}
        missing = {
            key: picture
            for key, picture in zip(keys, pictures, strict=True)
            if key not in found
        }
        if between is None:
            found |= self._make(missing)
            return [found[key] for key in keys]
        for key, picture in missing.items():
            found |= self._make({key: picture})
            between()
        return [found[key] for key in keys]

    def _make(self, missing: Mapping[str, Picture]) -> dict[str, mx.array]:
        """Encode pictures together, and keep what comes of it."""
        made = self._encode(list(missing.values())) if missing else []
        mx.eval(made)
        for key, tokens in zip(missing, made, strict=True):
            self._keep(key, tokens)
            if self._disk:
                self._disk.write(key, tokens)
        return dict(zip(missing, made, strict=True))

    def count_new_tiles(self, pictures: Sequence[Picture]) -> int:
        """How many tiles the next call would encode."""
        new = {
            key: len(picture.tiles)
            for picture in pictures
            if (key := self._key(picture)) not in self._kept
            and not (self._disk and self._disk.has(key))
        }
        return sum(new.values())

    def clear(self) -> None:
        """Forget what is in memory."""
        self._kept.clear()
        self._bytes = 0

    def _key(self, picture: Picture) -> str:
        digest = hashlib.sha256(f"{self._fingerprint} {picture.digest}".encode())
        for region in picture.regions:
            digest.update(repr(region.shape).encode() + region.tobytes())
        return digest.hexdigest()

    def _find(self, key: str) -> mx.array | None:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        tokens = self._disk.read(key) if self._disk else None
        if tokens is not None:
            self._keep(key, tokens)
        return tokens

    def _keep(self, key: str, tokens: mx.array) -> None:
        self._kept[key] = tokens
        self._bytes += tokens.nbytes
        while self._bytes > self._max_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= dropped.nbytes


class _Disk:
    """One small file per picture; those written first go first."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def read(self, key: str) -> mx.array | None:
        try:
            tokens = read_shard(self._path(key)).get("image_tokens")
        # A file that another process is deleting, or that was damaged, is encoded again.
        except (CheckpointError, OSError):
            return None
        if tokens is None or tokens.ndim != 2:
            return None
        mx.eval(tokens)
        return tokens

    def has(self, key: str) -> bool:
        return self._path(key).is_file()

    def write(self, key: str, tokens: mx.array) -> None:
        # What cannot be kept is computed again: a full disk stops no answer.
        with suppress(OSError, RuntimeError):
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f"{key}.{os.getpid()}.partial.safetensors"
            try:
                mx.save_safetensors(str(temporary), {"image_tokens": tokens})
                temporary.replace(self._path(key))
            finally:
                temporary.unlink(missing_ok=True)
            self._make_room()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _make_room(self) -> None:
        files = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(OSError):
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
        held = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if held <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            held -= size


def fingerprint(manifest: object, config: object, dtype: object) -> str:
    """A digest of a model's weights, by its manifest, of its config and its precision."""
    text = json.dumps([NUMERICS, manifest, config, str(dtype)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
