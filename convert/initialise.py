"""The tensors of parts that have no source."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mm1_mlx.config import MM1Config
from mm1_mlx.models import MM1
from mm1_mlx.shard import Deferred

from .origins import PARTS

SEED = 0


def initialise(
    config: MM1Config, parts: tuple[str, ...]
) -> Iterator[tuple[str, Deferred]]:
    """The tensors of these parts as a new model has them."""
    rest: Any = dict.fromkeys(set(PARTS) - set(parts))
    mx.random.seed(SEED)
    model = MM1(replace(config, **rest, image=None, prompt=None))
    tensors = dict(tree_flatten(model.parameters()))
    del model
    # Popped, so that a tensor that was written is freed.
    while tensors:
        name, tensor = tensors.popitem()
        yield name, Deferred.of(tensor)
