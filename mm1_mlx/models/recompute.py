"""A module whose inner states are computed again for its gradients, and not kept."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# Seeds are drawn below it.
SEEDS = 1 << 31


def recomputed(module: nn.Module) -> Callable[..., Any]:
    """The module's call (x, ...): equal results and gradients, in less memory.

    What it drops out at random it drops out again.
    """
    drops = any(
        isinstance(m, nn.Dropout) and m._p_1 < 1  # the share that is kept
        for m in module.modules()
    )

    def call(x: mx.array, *rest: Any) -> Any:
        seed = int(mx.random.randint(0, SEEDS).item()) if drops else None  # type: ignore[arg-type]

        def inner(parameters: Any, x: mx.array) -> Any:
            module.update(parameters)
            if seed is not None:
                mx.random.seed(seed)
            return module(x, *rest)

        return mx.checkpoint(inner)(module.trainable_parameters(), x)

    return call
