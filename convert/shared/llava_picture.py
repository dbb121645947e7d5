"""How checkpoints of LLaVA's make pictures: in one tile, or an overview and a grid.

https://github.com/haotian-liu/LLaVA/blob/c121f04/llava/mm_utils.py
"""

import json
from contextlib import suppress
from typing import Any

from mm1_mlx.config import AnyresTiling, ImageConfig, VisionConfig
from mm1_mlx.errors import ConfigError
from mm1_mlx.presets import CLIP_MEAN, CLIP_STD

from .fields import Fields

FILLS = {None: "crop", "square": "crop", "pad": "pad", "anyres": "squash"}
MERGES = {"flat": "flat", "spatial": "rows", "spatial_unpad": "unpad"}


def image_section(fields: Fields, vision: VisionConfig) -> ImageConfig:
    """How pictures are made: cropped, padded, or an overview and a grid of tiles."""
    fields.expect("image_aspect_ratio", *FILLS)
    fields.expect("mm_patch_merge_type", *MERGES)
    aspect, grids = fields.get("image_aspect_ratio"), fields.get("image_grid_pinpoints")
    tiling = None
    if aspect == "anyres":
        if not vision.drop_cls:
            raise ConfigError(
                "LlavaConfig.mm_vision_select_feature: 'cls_patch' is not supported with "
                "image_aspect_ratio 'anyres', for a class token has no place in a grid of "
                "tiles"
            )
        merge: Any = MERGES[fields.require("mm_patch_merge_type")]
        tiling = AnyresTiling(grids=_grids(grids, vision.image_size), merge=merge)
    return ImageConfig(
        size=vision.image_size,
        resize=FILLS[aspect],  # type: ignore[arg-type]
        mean=CLIP_MEAN,
        std=CLIP_STD,
        tiling=tiling,
    )


def _grids(pinpoints: Any, side: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns): LLaVA's own lists say [width, height], some in a string."""
    if isinstance(pinpoints, str):
        text = pinpoints.replace("(", "[").replace(")", "]")
        with suppress(ValueError, RecursionError):
            pinpoints = json.loads(text)
    return tuple((rows, columns) for columns, rows in divide_pinpoints(pinpoints, side))


def divide_pinpoints(pinpoints: Any, side: int) -> list[tuple[int, int]]:
    """Pairs of picture sides in pixels as numbers of tiles of ``side``.

    Raises:
        ConfigError: they are no such list.
    """
    if not isinstance(pinpoints, list) or not all(
        isinstance(p, list)
        and len(p) == 2
        and all(type(x) is int and x > 0 and x % side == 0 for x in p)
        for p in pinpoints
    ):
        raise ConfigError(
            f"image_grid_pinpoints: {pinpoints!r:.80} is not a list of pairs of "
            f"multiples of {side} pixels"
        )
    return [(a // side, b // side) for a, b in pinpoints]
