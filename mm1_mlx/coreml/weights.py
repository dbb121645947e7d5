"""A model folder -> its weights in float32, each read when it is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mm1_mlx.checkpoint import (
    build_model,
    cast_to,
    check_names,
    load_config,
    model_shapes,
)
from mm1_mlx.config import MM1Config
from mm1_mlx.errors import ConfigError
from mm1_mlx.models import MM1
from mm1_mlx.original import Original

Array = NDArray[np.float32]
# What the names of their tensors begin with.
PARTS = ("vision.", "connector.")


class Weights:
    """The encoder's and connector's weights of a model folder, by the names on disk.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the config.
        ConfigError: the model has no encoder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = encoder_of(load_config(path))
        self._stored = {
            name: tensor
            for name, tensor in Original(path).stored.items()
            if name.startswith(PARTS)
        }
        self._packed = [
            name.removesuffix(".scales")
            for name in self._stored
            if name.endswith(".scales")
        ]
        found = {name: tensor.shape for name, tensor in self._stored.items()}
        check_names(found, model_shapes(self.config, self._packed), path)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __call__(self, name: str) -> Array:
        """The tensor of a name; of a packed layer its weight unpacked."""
        path = name.removesuffix(".weight")
        if name != path and f"{path}.scales" in self:
            tensor = self._unpacked(path)
        else:
            tensor = self._stored[name].read()
        return np.array(tensor.astype(mx.float32))

    def get(self, name: str) -> Array | None:
        """The tensor of a name, None where the model has none."""
        return self(name) if name in self else None

    def model(self) -> MM1:
        """The encoder and connector with these weights, in float32."""
        tensors = []
        for name, tensor in self._stored.items():
            tensors.append((name, cast_to(mx.float32, tensor.read())))
            # Here, so that what it is cast from goes.
            mx.eval(tensors[-1][1])
        model = build_model(self.config, self._packed)
        model.load_weights(tensors)
        return cast(MM1, model.eval())

    def _unpacked(self, path: str) -> mx.array:
        assert self.config.quantization is not None
        way: dict[str, Any] = self.config.quantization.way(path).to_dict()
        biases = f"{path}.biases"
        return mx.dequantize(
            self._stored[f"{path}.weight"].read(),
            self._stored[f"{path}.scales"].read(),
            self._stored[biases].read() if biases in self else None,
            **way,
            dtype=mx.float32,
        )


def encoder_of(config: MM1Config) -> MM1Config:
    """The config of the encoder and connector alone.

    Raises:
        ConfigError: the model has no encoder, or does not say how pictures become tiles.
    """
    if config.vision is None or config.image is None:
        raise ConfigError("the model has no image encoder, so there is none to export")
    ways = config.quantization
    if ways is not None:
        own = (x for x in ways.modules if x[0].startswith(PARTS))
        ways = replace(ways, modules=tuple(own))
    return MM1Config(
        vision=config.vision,
        connector=config.connector,
        image=config.image,
        quantization=ways,
    )
