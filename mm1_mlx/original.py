"""A model folder from which another is made -> its tensors, files, and what stays true.

Who packs, fuses or trains a model changes some of its tensors and leaves the rest of the
folder as it was, but for what was said of the old model alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from mm1_mlx.checkpoint import CONFIG, INDEX, MANIFEST, load_manifest
from mm1_mlx.config import MM1Config
from mm1_mlx.files import safe_join
from mm1_mlx.partial import fingerprint, stamps
from mm1_mlx.pieces import TensorInfo, tensors_of
from mm1_mlx.shard import Deferred

# What is said of the model alone.
_OWN = (CONFIG, INDEX, MANIFEST, "parity.json")


class Original:
    """A model from which another is made.

    Args:
        path: its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _manifest(self) -> dict[str, Any]:
        return load_manifest(self.path)

    @cached_property
    def stored(self) -> dict[str, TensorInfo]:
        """Its tensors by name; none is read."""
        found: dict[str, TensorInfo] = {}
        for name, path in sorted(self.files.items()):
            if name.endswith(".safetensors"):
                found |= tensors_of(path)
        return found

    def tensors(self) -> dict[str, Deferred]:
        """The same as they are, read when they are written."""
        return {name: tensor.deferred() for name, tensor in self.stored.items()}

    @cached_property
    def files(self) -> dict[str, Path]:
        """Every file that its manifest lists, by name."""
        return {name: safe_join(self.path, name) for name in self._manifest["files"]}

    @property
    def kept(self) -> dict[str, Path]:
        """The files that the new model has too: a tokenizer's, pictures."""
        return {
            name: path
            for name, path in self.files.items()
            if name not in _OWN and not name.endswith(".safetensors")
        }

    def fingerprint(
        self,
        made: MM1Config,
        source: Mapping[str, Any],
        tensors: Mapping[str, Deferred],
    ) -> str:
        """A digest of all that decides what is written of it; no weight is read.

        Args:
            made: the new model's config.
            source: what its manifest says of where it comes from.
            tensors: its own, by name.
        """
        facts = {
            "config": made.to_dict(),
            "source": source,
            "files": stamps(self.files.values()),
            "tensors": {k: (x.shape, str(x.dtype)) for k, x in tensors.items()},
        }
        return fingerprint(facts)

    def source(self, changed: Collection[str] = ()) -> dict[str, Any]:
        """What the new model's manifest says of where it comes from.

        Args:
            changed: names of the tensors that were trained; parts of which that are all
                need training no longer.
        """
        known = self._manifest.get("source")
        source = dict(known) if isinstance(known, dict) else {}
        # That was checked of other weights.
        source.pop("parity_checked", None)
        needs = source.get("needs_training")
        if isinstance(needs, list):
            left = {name.partition(".")[0] for name in {*self.stored} - {*changed}}
            done = {name.partition(".")[0] for name in changed} - left
            source["needs_training"] = [part for part in needs if part not in done]
        return source
