"""A package beside the model that it was made from: the error of every stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mm1_mlx.coreml.describe import Facts
from mm1_mlx.coreml.interpreter import Interpreter
from mm1_mlx.coreml.layout import spell
from mm1_mlx.coreml.numbers import Precision
from mm1_mlx.coreml.program import FEATURES, IMAGE, IMAGE_TOKENS
from mm1_mlx.coreml.tiles import as_input
from mm1_mlx.coreml.weights import Weights
from mm1_mlx.errors import ConfigError
from mm1_mlx.image import ImageSource, load_picture
from mm1_mlx.models import MM1
from mm1_mlx.resolution import parse_mode

Array = NDArray[Any]
# From which on a package computes something else, by the length of the difference over
# that of the model's image tokens: many times what rounding costs.
WRONG: dict[Precision, float] = {"fp16": 2e-2, "fp32": 1e-3}


@dataclass(frozen=True)
class StageError:
    """How far a stage of the package is from the model's.

    Attributes:
        name: of the stage.
        l2: the difference's length over the model's.
        largest: the largest difference over the model's largest number.
        reach: the largest number of the package's.
    """

    name: str
    l2: float
    largest: float
    reach: float


def check(
    path: Path,
    package: Path,
    facts: Facts,
    pictures: Sequence[ImageSource],
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[int, list[StageError]]:
    """The error of every stage, first to last, by the size of tiles.

    Args:
        path: the model's folder.
        package: what was made of it.
        facts: what the package says of itself.
        pictures: what both see; each is one tile.
        progress: called with a task, how much is done and how much there is.

    Raises:
        ConfigError: a number is beyond half precision; names the layer.
        PromptError: a picture cannot be read.
    """
    weights = Weights(path)
    tiles = {size: tiles_of(weights, pictures, size) for size in facts.sizes}
    # One after the other: model and package both hold all weights.
    model = weights.model()
    expected = {
        size: [_model_stages(model, tile[None]) for tile in x]
        for size, x in tiles.items()
    }
    del model
    found = {}
    for size, pixels in tiles.items():
        run = Interpreter(package, facts.function(size))
        errors = []
        for number, stages in enumerate(expected.pop(size)):
            progress(f"pictures at {size}", number, len(pixels))
            tile = _input(weights, pixels[number : number + 1], facts)
            errors.append(_errors(stages, _package_stages(run, tile, stages)))
        progress(f"pictures at {size}", len(pixels), len(pixels))
        found[size] = [_worst(stages) for stages in zip(*errors, strict=True)]
    return found


def refuse_wrong(precision: Precision, found: dict[int, list[StageError]]) -> None:
    """Pass only if results are those of the model; of packed weights nothing is known.

    Raises:
        ConfigError: they are not; names the stage where they part.
    """
    most = WRONG.get(precision, math.inf)
    for size, stages in found.items():
        # Written so that it refuses NaN, too.
        if stages[-1].l2 <= most:
            continue
        first = next(x for x in stages if not x.l2 <= most)
        raise ConfigError(
            f"at {size} pixels the package's results are {stages[-1].l2:.2g} off those "
            f"of the model, more than {most:g}, from {first.name} on; export with "
            "--precision fp32"
        )


def tiles_of(
    weights: Weights, pictures: Sequence[ImageSource], size: int
) -> NDArray[np.float32]:
    """Normalised tiles [N, S, S, 3] of pictures, one of each."""
    assert weights.config.image is not None
    config = parse_mode(str(size), weights.config.image)
    return np.stack([load_picture(x, config).tiles[0] for x in pictures])


def _input(weights: Weights, pixels: NDArray[np.float32], facts: Facts) -> Array:
    assert weights.config.image is not None
    return as_input(pixels, weights.config.image, facts.input).astype(np.float32)


def _model_stages(model: MM1, pixels: NDArray[np.float32]) -> dict[str, Array]:
    """What every stage of the model gives for a tile, in order."""
    x = mx.array(pixels)
    seen: dict[str, mx.array] = {}
    blocks: list[Any] = model.vision.layers
    watched: list[Any] = [
        _Watched(block, spell(f"vision.layers.{i}"), seen)
        for i, block in enumerate(blocks)
    ]
    model.vision.layers = watched
    features = seen["vision_features"] = model.vision(x)
    model.vision.layers = blocks
    if "connector" in model:
        seen[IMAGE_TOKENS] = model.connector(features)
    else:
        seen[FEATURES] = features
    mx.eval(seen)
    return {name: np.array(x) for name, x in seen.items()}


class _Watched:
    """A block whose states are kept."""

    def __init__(self, block: Any, name: str, seen: dict[str, mx.array]) -> None:
        self.block, self.name, self.seen = block, name, seen

    def __call__(self, x: mx.array) -> mx.array:
        self.seen[self.name] = self.block(x)
        return self.seen[self.name]


def _package_stages(
    run: Interpreter, tile: Array, names: Collection[str]
) -> dict[str, Array]:
    """What the package's program gives under the names of stages."""
    seen: dict[str, Array] = {}

    def watch(name: str, value: Array) -> None:
        if name in names:
            # [1, C, 1, L] of the Neural Engine's layout.
            rows = value[:, :, 0].swapaxes(1, 2) if value.ndim == 4 else value
            seen[name] = rows.astype(np.float32)

    run({IMAGE: tile}, watch)
    return seen


def _errors(
    expected: Mapping[str, Array], found: Mapping[str, Array]
) -> list[StageError]:
    # Where no norm and no cut follows the last block, its states are the features.
    missing = expected.keys() - found.keys()
    assert missing <= {"vision_features"}
    return [
        _error(name, x, found[name])
        for name, x in expected.items()
        if name not in missing
    ]


def _error(name: str, expected: Array, found: Array) -> StageError:
    assert found.shape == expected.shape
    difference = found - expected
    return StageError(
        name=name,
        l2=float(np.linalg.norm(difference) / np.linalg.norm(expected)),
        largest=float(np.abs(difference).max() / np.abs(expected).max()),
        reach=float(np.abs(found).max()),
    )


def _worst(errors: Sequence[StageError]) -> StageError:
    """Of a stage's errors, picture by picture, the largest of each kind."""
    return StageError(
        errors[0].name,
        *(max(getattr(x, kind) for x in errors) for kind in ("l2", "largest", "reach")),
    )
