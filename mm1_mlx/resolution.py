"""Resolution modes by name: ``672``, ``2x672``, ``4-9x672``. No mlx.

MM1 (arXiv 2403.09611), section 4.1: 448 to 896 pixels by stretched position embeddings;
1344 and 1792 as an overview and 2 x 2 sub-images of 672 and 896. MM1.5 (arXiv 2409.20566),
section 3.5: 4 to 9 sub-images of 672, by the picture's shape.
"""

from __future__ import annotations

import re
from dataclasses import replace

from mm1_mlx.config import DynamicTiling, ImageConfig, MM1Config, SplitTiling, Tiling
from mm1_mlx.errors import ConfigError

_MODE = re.compile(r"(?:([0-9]{1,6})(?:-([0-9]{1,6}))?x)?([0-9]{1,6})")
SPELLINGS = (
    "SIZE for one tile, GRIDxSIZE for an overview and GRID x GRID tiles, MIN-MAXxSIZE for "
    "an overview and as many tiles as the picture's shape asks for"
)
# MM1's high resolution, 1344 pixels as an overview and 2 x 2 tiles, for encoders of the
# paper's sizes: at least 224 pixels, and patches that divide a tile.
HIGH_RESOLUTION = "2x672"
PAPER_SIZE = 224
# The modes of MM1 and MM1.5 for an encoder that learned on 378 pixels.
PAPER_MODES = (
    *("378", "448", "560", "672", "896"),
    *("2x672", "2x896", "4-9x672"),
)


def with_resolution(config: MM1Config, mode: str) -> MM1Config:
    """The config of the same model for pictures of another resolution mode.

    Raises:
        ConfigError: the mode is not one, or not one of this model's encoder.
    """
    if config.image is None or config.vision is None:
        raise ConfigError(f"resolution {mode!r}: the model takes no pictures")
    image = parse_mode(mode, config.image)
    patch = config.vision.patch_size
    if image.size % patch:
        raise ConfigError(
            f"resolution {mode!r}: {image.size} pixels are not a multiple of the "
            f"encoder's patches of {patch}"
        )
    return replace(config, image=image)


def high_resolution(config: MM1Config) -> MM1Config | None:
    """The config at MM1's high resolution; None where that is no other, or not its."""
    vision = config.vision
    if not config.sees or vision is None or vision.image_size < PAPER_SIZE:
        return None
    try:
        high = with_resolution(config, HIGH_RESOLUTION)
    except ConfigError:
        return None
    return high if high.image != config.image else None


def parse_mode(mode: str, image: ImageConfig) -> ImageConfig:
    """How pictures become tiles in a mode, everything else as in ``image``.

    What a tiling of the same kind says beside its numbers is kept, and a cut keeps its
    share of the picture.

    Raises:
        ConfigError: the mode is not spelled as one, or its numbers are out of range.
    """
    match = _MODE.fullmatch(mode)
    if match is None:
        raise ConfigError(f"resolution {mode!r} is not one; expected {SPELLINGS}")
    first, most, size = (int(x) if x else None for x in match.groups())
    assert size is not None
    tiling: Tiling | None = None
    old = image.tiling
    if most is not None and first is not None:
        dynamic = old if isinstance(old, DynamicTiling) else DynamicTiling()
        tiling = replace(dynamic, min_tiles=first, max_grid_tiles=most)
    elif first is not None:
        split = old if isinstance(old, SplitTiling) else SplitTiling()
        tiling = replace(split, grid=first)
    crop = image.crop_from and round(image.crop_from * size / image.size)
    return replace(image, size=size, crop_from=crop, tiling=tiling)


def name_mode(image: ImageConfig) -> str:
    """The mode's name, for people."""
    tiling = image.tiling
    if tiling is None:
        return str(image.size)
    if isinstance(tiling, SplitTiling):
        return f"{tiling.grid}x{image.size}"
    if isinstance(tiling, DynamicTiling):
        return f"{tiling.min_tiles}-{tiling.max_grid_tiles}x{image.size}"
    return f"anyres {image.size}"
