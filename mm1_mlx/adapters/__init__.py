"""Small sets of weights that change a model: made, kept, read and put to use."""

from mm1_mlx.adapters.attach import attach
from mm1_mlx.adapters.compose import Adapters, Named, load_adapted, parse
from mm1_mlx.adapters.config import AdapterConfig
from mm1_mlx.adapters.folder import (
    RESOLUTION,
    Adapter,
    Base,
    base_of,
    load,
    save,
    tensors_of,
)

__all__ = [
    "RESOLUTION",
    "Adapter",
    "AdapterConfig",
    "Adapters",
    "Base",
    "Named",
    "attach",
    "base_of",
    "load",
    "load_adapted",
    "parse",
    "save",
    "tensors_of",
]
