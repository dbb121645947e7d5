"""What a package says of itself: for people, and for the runtime that is to use it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from mm1_mlx.checkpoint import read_manifest
from mm1_mlx.config import MM1Config
from mm1_mlx.coreml.numbers import Precision
from mm1_mlx.errors import CheckpointError

# The keys of what is for the runtime, in the package's own metadata.
CONFIG_KEY, FACTS_KEY = "mm1.config", "mm1.export"
Input = Literal["image", "tensor"]


@dataclass(frozen=True)
class Facts:
    """What a user of a package must know of it.

    Attributes:
        digest: of the weights and config that it was made from.
        sizes: sides of its tiles in pixels; several are a function each.
        precision: of its weights.
        layout: ``nlc`` or ``bc1s``.
        input: ``image``, a picture; or ``tensor``, numbers from 0 to 1 [1, 3, S, S].
        compute_units: what it was laid out for, by coremltools' names.
        made_by: the program that wrote it.
    """

    digest: str
    sizes: tuple[int, ...]
    precision: Precision
    layout: Literal["nlc", "bc1s"]
    input: Input
    compute_units: str
    made_by: str

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> Facts:
        """Those of a package.

        Raises:
            CheckpointError: it has none.
        """
        try:
            values = json.loads(metadata[FACTS_KEY])
            return cls(**values | {"sizes": tuple(values["sizes"])})
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                "the package does not say what it was made from; make it with "
                "'mm1 export coreml'"
            ) from None

    def function(self, size: int) -> str | None:
        """The name of the function for tiles of a size; None where there is one only."""
        return function_name(size) if len(self.sizes) > 1 else None


def function_name(size: int) -> str:
    """What the function for tiles of a size is called."""
    return f"tile_{size}"


def digest_of(path: Path, config: MM1Config) -> str:
    """A digest of a model's weights, by its manifest, and of what its encoder is."""
    files = read_manifest(path)["files"]
    weights = {k: v for k, v in files.items() if k.endswith(".safetensors")}
    sections = config.to_dict()
    image = sections["image"]
    decides = [sections["vision"], sections["connector"], image["mean"], image["std"]]
    text = json.dumps([weights, decides], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def made_by() -> str:
    """The programs that decide what is written."""
    return f"mm1-mlx {version('mm1-mlx')}, coremltools {version('coremltools')}"


def describe(description: Any, path: Path, config: MM1Config, facts: Facts) -> None:
    """Fill in a package's description, a protobuf message.

    Args:
        description: of the package.
        path: the folder of the model that it was made from.
        config: of the encoder and connector.
        facts: what the runtime has to know.
    """
    source = read_manifest(path).get("source")
    source = source if isinstance(source, dict) else {}
    name = _said(source, "name") or path.resolve().name
    tokens = config.connector is not None
    metadata = description.metadata
    metadata.author = f"{name}, exported by mm1-mlx"
    metadata.license = _said(source, "licence") or "not stated; ask the model's author"
    metadata.versionString = facts.made_by
    metadata.shortDescription = (
        f"Image encoder{' and connector' * tokens} of {name}: one tile of a picture to "
        f"{'image tokens' if tokens else 'patch features'}. {_ways(facts)}"
    )
    metadata.userDefined[CONFIG_KEY] = json.dumps(config.to_dict(), sort_keys=True)
    metadata.userDefined[FACTS_KEY] = json.dumps(asdict(facts), sort_keys=True)
    for features in (description, *description.functions):
        for one in features.input:
            one.shortDescription = _input(facts)
        for one in features.output:
            one.shortDescription = (
                f"{'Image tokens' if tokens else 'Patch features'} [1, K, D], float32, "
                "in raster order"
            )


def _ways(facts: Facts) -> str:
    sizes = " or ".join(f"{size} x {size}" for size in facts.sizes)
    return f"Tiles of {sizes} pixels; weights in {facts.precision}, {facts.layout}."


def _input(facts: Facts) -> str:
    if facts.input == "image":
        return "RGB picture; it is normalised inside"
    return "Red, green and blue from 0 to 1, [1, 3, S, S]; normalised inside"


def _said(source: Mapping[str, Any], key: str) -> str | None:
    """What a model's manifest says of its source, or of its parts' sources."""
    records: Sequence[Any] = [source, *source.values()]
    said = (x.get(key) for x in records if isinstance(x, dict))
    found = dict.fromkeys(x for x in said if isinstance(x, str))
    return " and ".join(found) or None
