"""What the parity tests of AIM's encoders have in common."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from parity import TOLERANCE, difference, pictures, undetected_swaps

from mm1_mlx.checkpoint import load_model
from mm1_mlx.config import VisionConfig
from mm1_mlx.models import MM1

SIDE = 42
# Features [N, L, C] of pixels [N, H, W, 3].
Features = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def our_features(model: MM1, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.array(model.vision(mx.array(pixels)))


def check_features(out: Path, features: Features) -> None:
    """Assert that the model's features of two pictures are the reference's, and differ."""
    first, second = pictures(SIDE)
    for pixels in (first, second):
        check_picture(out, features, pixels)
    assert difference(our_features(load_model(out), first), features(second)) > 0.1


def check_picture(out: Path, features: Features, pixels: NDArray[np.float32]) -> None:
    """Assert that the model's features of a picture are the reference's."""
    ours = our_features(load_model(out), pixels)
    assert difference(ours, features(pixels)) <= TOLERANCE


def check_swaps(folder: Path, out: Path) -> int:
    """Assert that every swap of two rules is noticed; their number."""
    pixels = pictures(SIDE)[0]
    count, unnoticed = undetected_swaps(folder, out, lambda m: our_features(m, pixels))
    assert unnoticed == []
    return count


def expected(**changes: Any) -> VisionConfig:
    """Our config of an encoder of AIM's, whatever its version, with these changes."""
    values = {
        "image_size": SIDE,
        "patch_size": 14,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "class_token": False,
        "patch_bias": True,
        "patch_norm": True,
        "pre_norm": False,
        **changes,
    }
    return VisionConfig(**values)
