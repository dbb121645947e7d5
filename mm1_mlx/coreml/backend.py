"""A Core ML package in place of a model's encoder and connector."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mm1_mlx.checkpoint import load_config
from mm1_mlx.config import ImageConfig
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.folders import user_path

if TYPE_CHECKING:
    from mm1_mlx.coreml.describe import Facts

# Where a package is looked for in a model's folder if nobody says.
NAME = "Encoder.mlpackage"
# The results [1, K, D] of a tile [1, 3, S, S], by name.
Predictor = Callable[[NDArray[Any]], NDArray[Any]]
# A package, what it says of itself and the side of a tile -> how it is run.
Open = Callable[[Path, "Facts", int], Predictor]


@dataclass
class CoreML:
    """Image tokens by a package.

    Attributes:
        package: its place; ``NAME`` in the model's folder if None.
        open: how it is run, by default by Core ML.
    """

    package: Path | None = None
    open: Open | None = None
    _facts: Facts | None = field(default=None, init=False)
    _image: ImageConfig | None = field(default=None, init=False)
    _predictors: dict[int, Predictor] = field(default_factory=dict, init=False)

    @classmethod
    def named(cls, name: str) -> CoreML | None:
        """The backend of ``mlx``, ``coreml`` or ``coreml:PACKAGE``; None of ``mlx``.

        Raises:
            ConfigError: the name is none of these.
        """
        kind, _, place = name.partition(":")
        if name == "mlx":
            return None
        if kind != "coreml":
            raise ConfigError(
                f"vision backend {name!r} is not one; expected mlx, coreml or "
                "coreml:PACKAGE"
            )
        return cls(user_path(place) if place else None)

    def attach(self, path: Path, image: ImageConfig | None) -> list[Any]:
        """Take a model's place, of a folder; what tells these image tokens from others.

        Args:
            path: the model's folder.
            image: how pictures become tiles.

        Raises:
            CheckpointError: the package is not there or was made from another model.
            ConfigError: Core ML is not here, or the package gives no image tokens.
        """
        if self.open is None and sys.platform != "darwin":
            raise ConfigError(
                "Core ML needs macOS; answer with --vision-backend mlx here, where "
                "'mm1 export coreml' still makes and checks packages"
            )
        from mm1_mlx.coreml.describe import Facts, digest_of
        from mm1_mlx.coreml.interpreter import read_spec
        from mm1_mlx.coreml.weights import encoder_of

        config = encoder_of(load_config(path))
        if config.connector is None:
            raise ConfigError("the model has no connector, so its package gives none")
        place = self.package = self.package or path / NAME
        facts = Facts.read(dict(read_spec(place).description.metadata.userDefined))
        if facts.digest != digest_of(path, config):
            raise CheckpointError(
                f"{str(place)!r} was made from another model than {str(path)!r}; make it "
                f"again with 'mm1 export coreml {path} -o {place} --overwrite'"
            )
        self._facts, self._image = facts, image
        return ["coreml", facts.precision, facts.layout, facts.input, facts.made_by]

    def __call__(self, pixels: NDArray[np.float32]) -> mx.array:
        """Image tokens [N, K, D] of normalised tiles [N, S, S, 3].

        Raises:
            ConfigError: the package takes no tiles of this size.
        """
        from mm1_mlx.coreml.tiles import as_input

        assert self._facts is not None
        assert self._image is not None
        predict = self._predictor(pixels.shape[1], self._facts)
        tiles = as_input(pixels, self._image, self._facts.input)
        return mx.array(np.concatenate([predict(tile[None]) for tile in tiles]))

    def _predictor(self, size: int, facts: Facts) -> Predictor:
        if size not in facts.sizes:
            raise ConfigError(
                f"the Core ML package takes tiles of {list(facts.sizes)} pixels, not "
                f"{size}; export it with --resolution {size}"
            )
        if size not in self._predictors:
            assert self.package is not None
            opened = self.open or open_core_ml
            self._predictors[size] = opened(self.package, facts, size)
        return self._predictors[size]


def open_core_ml(package: Path, facts: Facts, size: int) -> Predictor:
    """A package as Core ML runs it; macOS alone has that."""
    from PIL import Image

    from mm1_mlx.coreml.program import IMAGE, IMAGE_TOKENS
    from mm1_mlx.coreml.tools import ct

    model = ct.models.MLModel(
        str(package),
        compute_units=ct.ComputeUnit[facts.compute_units],
        function_name=facts.function(size),
    )

    def predict(tile: NDArray[Any]) -> NDArray[Any]:
        image: Any = tile
        if facts.input == "image":
            image = Image.fromarray(tile[0].transpose(1, 2, 0))
        return np.asarray(model.predict({IMAGE: image})[IMAGE_TOKENS], np.float32)

    return predict


def open_interpreter(package: Path, facts: Facts, size: int) -> Predictor:
    """A package as numpy runs it, anywhere and slowly."""
    from mm1_mlx.coreml.interpreter import Interpreter
    from mm1_mlx.coreml.program import IMAGE, IMAGE_TOKENS

    run = Interpreter(package, facts.function(size))
    return lambda tile: run({IMAGE: tile.astype(np.float32)})[IMAGE_TOKENS]
