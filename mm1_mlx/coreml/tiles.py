"""Normalised tiles -> what a package takes: pixels as they were before."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm1_mlx.config import ImageConfig
from mm1_mlx.coreml.describe import Input


def as_input(
    pixels: NDArray[np.float32], image: ImageConfig, kind: Input
) -> NDArray[Any]:
    """Tiles [N, S, S, 3] of mean 0 as red, green and blue [N, 3, S, S].

    Args:
        pixels: normalised tiles.
        image: how they were normalised.
        kind: ``image``: bytes; ``tensor``: float32 from 0 to 1.
    """
    mean, std = (np.asarray(x, np.float32) for x in (image.mean, image.std))
    x = (pixels * std + mean).transpose(0, 3, 1, 2)
    if kind == "tensor":
        return np.ascontiguousarray(x, np.float32)
    return np.rint(x * 255).clip(0, 255).astype(np.uint8)
