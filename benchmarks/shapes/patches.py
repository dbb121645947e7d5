"""The first stage: the encoder learns what stands on every patch, shape and colour.

A caption tells a fresh encoder little about a picture; a label on each of its patches
tells it where to look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from benchmarks.shapes.balance import class_adjustments
from benchmarks.shapes.draw import draw
from benchmarks.shapes.recipe import Recipe, Stage, picture_rng, random_picture_scene
from benchmarks.shapes.scene import COLOURS, SHAPES, UNNAMED, Scene
from mm1_mlx.config import MM1Config
from mm1_mlx.image import load_picture
from mm1_mlx.models.vision import VisionEncoder

# Class 0 is the background; a colour without a name is no class.
SHAPE_CLASSES = {name: i for i, name in enumerate(SHAPES, 1)}
COLOUR_CLASSES = {name: i for i, name in enumerate(COLOURS, 1)} | {UNNAMED: -1}


@dataclass(frozen=True)
class PatchBatch:
    """Tiles [N, H, W, 3] and the classes of every patch, [N, L]."""

    pixels: NDArray[np.float32]
    shapes: NDArray[np.int32]
    colours: NDArray[np.int32]


class PatchHeads(nn.Module):
    """Shape and colour scores [N, L, classes] of patch features [N, L, C]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.shape = nn.Linear(hidden_size, len(SHAPES) + 1)
        self.colour = nn.Linear(hidden_size, len(COLOURS) + 1)

    def __call__(self, features: mx.array) -> tuple[mx.array, mx.array]:
        return self.shape(features), self.colour(features)


class PatchClassifier(nn.Module):
    """An encoder with heads."""

    def __init__(self, vision: VisionEncoder, heads: PatchHeads) -> None:
        super().__init__()
        self.vision = vision
        self.heads = heads


def patch_loss(
    heads: PatchHeads, features: mx.array, batch: PatchBatch, *, balanced: bool = False
) -> mx.array:
    """Mean over patches of the cross-entropies of shape and colour, in nats."""
    shapes, colours = heads(features)
    if balanced:
        by_colour, by_shape = class_adjustments()
        # The index -1 is the last row's: no name, no adjustment.
        shapes = shapes + mx.array(by_colour[batch.colours])
        colours = colours + mx.array(by_shape[batch.shapes])
    losses = nn.losses.cross_entropy(shapes, mx.array(batch.shapes))
    named = mx.array(batch.colours >= 0)
    labels = mx.array(np.maximum(batch.colours, 0))
    losses = losses + nn.losses.cross_entropy(colours, labels) * named
    return losses.mean()


def encoder_loss(
    model: PatchClassifier, batch: PatchBatch
) -> tuple[mx.array, mx.array]:
    """The patches' loss, and their number."""
    features = model.vision(mx.array(batch.pixels))
    return patch_loss(model.heads, features, batch), mx.array(batch.shapes.size)


class Patches:
    """The labelled pictures of (step, shard)."""

    def __init__(self, recipe: Recipe, stage: Stage) -> None:
        self.recipe = recipe
        self.stage = stage

    def __call__(self, step: int, shard: int) -> PatchBatch:
        rng = picture_rng(self.stage.train.seed, step, shard)
        shares = self.stage.unnamed
        count = self.recipe.pictures_per_batch
        scenes = [random_picture_scene(rng, shares) for _ in range(count)]
        return label_patches(scenes, self.recipe.config)


def label_patches(scenes: Sequence[Scene], config: MM1Config) -> PatchBatch:
    """The scenes drawn, and what stands on their patches."""
    assert config.vision is not None
    assert config.image is not None
    tiles = [load_picture(draw(scene), config.image).tiles[0] for scene in scenes]
    classes = [patch_classes(scene, config.vision.grid_size) for scene in scenes]
    shapes, colours = zip(*classes, strict=True)
    return PatchBatch(np.stack(tiles), np.stack(shapes), np.stack(colours))


def patch_classes(
    scene: Scene, grid: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Shape and colour class [grid * grid] of the object around each patch's centre."""
    side = max(scene.width, scene.height)
    centres = (np.arange(grid) + 0.5) * side / grid
    # The picture stands in the middle of a square.
    x = centres[None, :] - (side - scene.width) / 2
    y = centres[:, None] - (side - scene.height) / 2
    shapes = np.zeros((grid, grid), np.int32)
    colours = np.zeros((grid, grid), np.int32)
    # Half a patch more, so that the smallest object has a patch.
    reach = side / grid / 2
    for item in scene.objects:
        inside = np.hypot(x - item.x, y - item.y) <= item.radius + reach
        shapes[inside] = SHAPE_CLASSES[item.shape]
        colours[inside] = COLOUR_CLASSES[item.colour]
    return shapes.flatten(), colours.flatten()
