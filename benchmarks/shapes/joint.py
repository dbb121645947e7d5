"""The later stages: a model answers, labels patches and points at what is named."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from benchmarks.shapes.conversations import JointBatch
from benchmarks.shapes.matches import match_loss
from benchmarks.shapes.patches import PatchHeads, pair_losses, patch_loss
from benchmarks.shapes.recipe import Recipe
from benchmarks.shapes.rows import Behind, Recorder, Rows, layer_states
from benchmarks.shapes.scene import COLOURS, SHAPES
from mm1_mlx.layout import group_tiles
from mm1_mlx.models import MM1


class AttributeHeads(nn.Module):
    """Shape and colour scores of the decoder's states before its last block.

    There it has to know what an example shows, for the last block finds like ones by it.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size)
        self.shape = nn.Linear(hidden_size, len(SHAPES) + 1)
        self.colour = nn.Linear(hidden_size, len(COLOURS) + 1)

    def __call__(self, states: mx.array) -> tuple[mx.array, mx.array]:
        """Scores [M, classes] of states [M, D]."""
        states = self.norm(states)
        return self.shape(states), self.colour(states)


class Pupil(nn.Module):
    """The model, and what is trained beside it and thrown away."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        assert recipe.config.vision is not None
        assert recipe.config.decoder is not None
        decoder = recipe.config.decoder
        self.mm1 = MM1(recipe.config)
        self.heads = PatchHeads(recipe.config.vision.hidden_size)
        # A decoder's state to x and y.
        self.point = nn.Linear(decoder.hidden_size, 2)
        self.attributes = AttributeHeads(decoder.hidden_size)
        self.patch_weight = recipe.patch_weight
        self.point_weight = recipe.point_weight
        self.attribute_weight = recipe.attribute_weight
        self.match_weight = recipe.match_weight


def joint_loss(
    pupil: Pupil, batch: JointBatch
) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
    """Loss of the answers plus the weighted ones of what is learned beside them.

    The answers' is the mean over their tokens as they are weighted; the second value is
    the sum of these weights.
    """
    mm1 = pupil.mm1
    # Every process of a run logs the same parts, whatever its batches are of.
    besides = ("patches", "points", "attributes", "matches")
    losses = {name: mx.array(0.0) for name in besides}
    if batch.patches is None:
        images = _encoded(mm1, batch)
    else:
        features = mm1.vision(mx.array(batch.patches.pixels))
        if not batch.teaches_encoder:
            features = mx.stop_gradient(features)
        elif _learns(mm1.vision):
            patches = patch_loss(pupil.heads, features, batch.patches, balanced=True)
            losses["patches"] = pupil.patch_weight * patches
        images = list(mm1.connector(features))
    caches = [Recorder() for _ in mm1.layers]
    if batch.prefixes is not None:
        B, P = batch.prefixes.tokens.shape
        flat = mx.array(batch.prefixes.tokens.flatten())
        x = mm1.embed(flat, images, batch.prefixes.spans)
        layer_states(mm1.decoder, x.reshape(B, P, -1), caches)
    total, weight = mx.array(0.0), 0.0
    misses, pointed = mx.array(0.0), 0
    groups = sum(rows.examples is not None for rows in batch.rows)
    for rows in batch.rows:
        states = _states(pupil, rows, images, caches)
        last = mm1.decoder.norm(states[-1])
        total = total + _weighted_loss(pupil, rows, last)
        weight += float(rows.weights.sum())
        if rows.mentions.tokens.size:
            named = last.flatten(0, 1)[mx.array(rows.mentions.tokens)]
            places = mx.array(rows.mentions.places)
            misses = misses + (pupil.point(named) - places).square().sum()
            pointed += rows.mentions.places.size
        if rows.examples:
            known = _attribute_loss(pupil, rows, states[-2]) / groups
            losses["attributes"] += pupil.attribute_weight * known
            found = match_loss(mm1.layers[-1], states[-2], rows.examples) / groups
            losses["matches"] += pupil.match_weight * found
    answers = total / max(weight, 1e-6)
    if pointed:
        losses["points"] = pupil.point_weight * misses / (pointed / 2)
    loss = answers + sum(losses.values())
    return loss, mx.array(weight), losses | {"answers": answers}


def _encoded(mm1: MM1, batch: JointBatch) -> list[mx.array]:
    """The image tokens of pictures of several tiles, one tile's behind another's."""
    (group,) = group_tiles(batch.tiled)
    features = mm1.vision(mx.array(group.pixels))
    if not batch.teaches_encoder:
        features = mx.stop_gradient(features)
    tokens = dict(zip(group.places, mm1.connector(features), strict=True))
    return [
        mx.concatenate([tokens[i, j] for j in range(len(picture.tiles))])
        for i, picture in enumerate(batch.tiled)
    ]


def _learns(module: nn.Module) -> bool:
    """Whether any of its weights is trained."""
    return bool(tree_flatten(module.trainable_parameters()))


def _states(
    pupil: Pupil, rows: Rows, images: list[mx.array], caches: list[Recorder]
) -> list[mx.array]:
    """The states [B, T, D] of the rows behind every block."""
    mm1, batch = pupil.mm1, rows.batch
    B, T = batch.tokens.shape
    flat = mx.array(batch.tokens.flatten())
    x = mm1.embed(flat, images if batch.spans else [], batch.spans).reshape(B, T, -1)
    if rows.owners is None:
        return layer_states(mm1.decoder, x)
    owners = mx.array(rows.owners)
    return layer_states(mm1.decoder, x, [Behind(kept, owners) for kept in caches])


def _weighted_loss(pupil: Pupil, rows: Rows, states: mx.array) -> mx.array:
    """Cross-entropies (nats) of the learned tokens, weighted and summed."""
    learned = rows.batch.learned[:, 1:]
    targets = mx.array(rows.batch.tokens[:, 1:][learned])
    read = states[:, :-1].flatten(0, 1)[mx.array(np.flatnonzero(learned))]
    scores = pupil.mm1.decoder.logits(read) + mx.array(rows.adjustment)
    losses = nn.losses.cross_entropy(scores, targets)
    if rows.shares.any():
        shares = mx.array(rows.shares)
        softer = nn.losses.cross_entropy(scores, mx.array(rows.rivals))
        losses = losses + shares * (softer - losses)
    return (losses * mx.array(rows.weights)).sum()


def _attribute_loss(pupil: Pupil, rows: Rows, states: mx.array) -> mx.array:
    """Mean cross-entropy of the shape and the colour of every example.

    Balanced where pictures show them: what is told in words is of all pairs.
    """
    examples = rows.examples
    read = states.flatten(0, 1)[mx.array(examples.tokens)]
    classes = examples.shapes, examples.colours
    shown = bool(rows.batch.spans)
    return pair_losses(*pupil.attributes(read), *classes, balanced=shown).mean()
