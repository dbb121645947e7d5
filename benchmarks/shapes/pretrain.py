"""The encoder's first stage: what stands on every patch, its shape and its colour.

A caption tells a fresh encoder little about a picture; a label on each of its patches
tells it where to look. The encoder then goes into the joint training of the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from benchmarks.shapes.draw import draw
from benchmarks.shapes.recipe import Recipe, picture_rng, random_picture_scene
from benchmarks.shapes.scene import COLOURS, SHAPES, Scene
from mm1_mlx.config import VisionConfig
from mm1_mlx.image import load_picture
from mm1_mlx.models.vision import CLIPEncoder

# Class 0 is the background.
SHAPE_CLASSES = {name: i for i, name in enumerate(SHAPES, 1)}
COLOUR_CLASSES = {name: i for i, name in enumerate(COLOURS, 1)}


class PatchClassifier(nn.Module):
    """Shape and colour scores [N, L, classes] of every patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.vision = CLIPEncoder(config)
        self.shape = nn.Linear(config.hidden_size, len(SHAPES) + 1)
        self.colour = nn.Linear(config.hidden_size, len(COLOURS) + 1)

    def __call__(self, pixels: mx.array) -> tuple[mx.array, mx.array]:
        features = self.vision(pixels)
        return self.shape(features), self.colour(features)


@dataclass(frozen=True)
class PatchBatch:
    """Tiles [N, H, W, 3] and the class of every patch, [N, L]."""

    pixels: NDArray[np.float32]
    shapes: NDArray[np.int32]
    colours: NDArray[np.int32]


class PatchBatches:
    """The batch of (step, shard)."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __call__(self, step: int, shard: int) -> PatchBatch:
        rng = picture_rng(self.recipe.pretrain.seed, step, shard)
        config = self.recipe.config
        assert config.vision is not None
        assert config.image is not None
        pixels, shapes, colours = [], [], []
        for _ in range(self.recipe.pictures_per_step):
            scene = random_picture_scene(rng)
            pixels.append(load_picture(draw(scene), config.image).tiles[0])
            shape, colour = patch_classes(scene, config.vision.grid_size)
            shapes.append(shape)
            colours.append(colour)
        return PatchBatch(np.stack(pixels), np.stack(shapes), np.stack(colours))


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


def patch_loss(model: PatchClassifier, batch: PatchBatch) -> tuple[mx.array, mx.array]:
    """Mean cross-entropy (nats) of both classes, and the number of patches."""
    shapes, colours = model(mx.array(batch.pixels))
    labels = mx.array(batch.shapes), mx.array(batch.colours)
    losses = nn.losses.cross_entropy(shapes, labels[0])
    losses = losses + nn.losses.cross_entropy(colours, labels[1])
    return losses.mean(), mx.array(losses.size)
