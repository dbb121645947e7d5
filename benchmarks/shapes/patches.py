"""The first stage: the encoder learns what stands on every patch: shape, colour, letter.

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
from benchmarks.shapes.draw import draw, letter_places
from benchmarks.shapes.recipe import (
    Recipe,
    Stage,
    picture_rng,
    picture_side,
    random_picture_scene,
)
from benchmarks.shapes.scene import COLOURS, SHAPES, UNNAMED, Scene, pick, recolour
from benchmarks.shapes.writing import CHARACTERS, MIN_LEGIBLE, writing_scene
from mm1_mlx.config import MM1Config
from mm1_mlx.image import load_picture
from mm1_mlx.models.vision import VisionEncoder

# Class 0 is the background; a colour without a name is no class.
SHAPE_CLASSES = {name: i for i, name in enumerate(SHAPES, 1)}
COLOUR_CLASSES = {name: i for i, name in enumerate(COLOURS, 1)} | {UNNAMED: -1}
LETTER_CLASSES = {letter: i for i, letter in enumerate(CHARACTERS, 1)}
# Shares of the first stage's pictures that show writing, and nothing but writing.
WRITTEN, ONLY_WRITTEN = 0.4, 0.2


@dataclass(frozen=True)
class PatchBatch:
    """Tiles [N, H, W, 3] and the classes of every patch, [N, L]."""

    pixels: NDArray[np.float32]
    shapes: NDArray[np.int32]
    colours: NDArray[np.int32]
    # -1 where a letter stands that is too small to be told.
    letters: NDArray[np.int32]


class PatchHeads(nn.Module):
    """Shape, colour and letter scores [N, L, classes] of patch features [N, L, C]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.shape = nn.Linear(hidden_size, len(SHAPES) + 1)
        self.colour = nn.Linear(hidden_size, len(COLOURS) + 1)
        self.letter = nn.Linear(hidden_size, len(CHARACTERS) + 1)

    def __call__(self, features: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        return self.shape(features), self.colour(features), self.letter(features)


class PatchClassifier(nn.Module):
    """An encoder with heads."""

    def __init__(self, vision: VisionEncoder, heads: PatchHeads) -> None:
        super().__init__()
        self.vision = vision
        self.heads = heads


def patch_loss(
    heads: PatchHeads, features: mx.array, batch: PatchBatch, *, balanced: bool = False
) -> mx.array:
    """Mean over patches of the cross-entropies of what stands on them, in nats."""
    *scores, letters = heads(features)
    losses = pair_losses(*scores, batch.shapes, batch.colours, balanced=balanced)
    legible = mx.array(batch.letters >= 0)
    labels = mx.array(np.maximum(batch.letters, 0))
    losses = losses + nn.losses.cross_entropy(letters, labels) * legible
    return losses.mean()


def pair_losses(
    shapes: mx.array,
    colours: mx.array,
    shape_classes: NDArray[np.int32],
    colour_classes: NDArray[np.int32],
    *,
    balanced: bool,
) -> mx.array:
    """Cross-entropies [...] of shapes and of colours that have a name, in nats.

    Args:
        shapes: scores [..., classes].
        colours: scores [..., classes].
        shape_classes: [...].
        colour_classes: [...], -1 for a colour without a name.
        balanced: whether pairs that never occur are no evidence (``balance``).
    """
    if balanced:
        by_colour, by_shape = class_adjustments()
        # The index -1 is the last row's: no name, no adjustment.
        shapes = shapes + mx.array(by_colour[colour_classes])
        colours = colours + mx.array(by_shape[shape_classes])
    losses = nn.losses.cross_entropy(shapes, mx.array(shape_classes))
    named = mx.array(colour_classes >= 0)
    labels = mx.array(np.maximum(colour_classes, 0))
    return losses + nn.losses.cross_entropy(colours, labels) * named


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
        count = self.stage.pictures
        scenes = [random_labelled_scene(rng, shares) for _ in range(count)]
        return label_patches(scenes, self.recipe.config)


def random_labelled_scene(
    rng: np.random.Generator, unnamed_shares: Sequence[float]
) -> Scene:
    """Shapes, writing, or both."""
    if rng.random() >= WRITTEN:
        return random_picture_scene(rng, unnamed_shares)
    objects = rng.random() >= ONLY_WRITTEN / WRITTEN
    scene = writing_scene(rng, short_side=picture_side(rng), objects=objects)
    return recolour(scene, pick(rng, unnamed_shares), rng)


def label_patches(scenes: Sequence[Scene], config: MM1Config) -> PatchBatch:
    """The scenes drawn, and what stands on their patches."""
    assert config.image is not None
    assert config.vision is not None
    grid, size = config.vision.grid_size, config.vision.image_size
    tiles = [load_picture(draw(scene), config.image).tiles[0] for scene in scenes]
    classes = [patch_classes(scene, grid) for scene in scenes]
    shapes, colours = zip(*classes, strict=True)
    letters = [letter_classes(scene, grid, size) for scene in scenes]
    return PatchBatch(
        np.stack(tiles), np.stack(shapes), np.stack(colours), np.stack(letters)
    )


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


def letter_classes(scene: Scene, grid: int, size: int) -> NDArray[np.int32]:
    """The letter [grid * grid] whose middle is nearest, of those that a patch lies on.

    Args:
        scene: whose labels they are.
        grid: patches of a side.
        size: pixels of the encoder's input, a side.
    """
    side = max(scene.width, scene.height)
    centres = (np.arange(grid) + 0.5) * side / grid
    x = centres[None, :] - (side - scene.width) / 2
    y = centres[:, None] - (side - scene.height) / 2
    letters = np.zeros((grid, grid), np.int32)
    nearest = np.full((grid, grid), np.inf)
    patch = side / grid
    for label in scene.labels:
        # A letter has a patch at least on each of its sides' middle.
        near_row = np.abs(y - label.y) <= max(label.height / 2, patch / 2)
        legible = label.height * size / side >= MIN_LEGIBLE
        for letter, middle in zip(label.text, letter_places(label), strict=True):
            distance = np.abs(x - middle) + 0 * y
            inside = near_row & (distance <= max(0.45 * label.height, patch / 2))
            closer = inside & (distance < nearest)
            letters[closer] = LETTER_CLASSES[letter] if legible else -1
            nearest[closer] = distance[closer]
    return letters.flatten()
