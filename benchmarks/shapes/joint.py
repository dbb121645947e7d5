"""The second stage: a model answers, labels patches and points at what is named."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from benchmarks.shapes.conversations import JointBatch
from benchmarks.shapes.patches import PatchHeads, patch_loss
from benchmarks.shapes.recipe import Recipe
from mm1_mlx.models import MM1
from mm1_mlx.train.loss import batch_states, states_loss


class Pupil(nn.Module):
    """The model, and what is trained beside it and thrown away."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        assert recipe.config.vision is not None
        assert recipe.config.decoder is not None
        self.mm1 = MM1(recipe.config)
        self.heads = PatchHeads(recipe.config.vision.hidden_size)
        # A decoder's state to x and y.
        self.point = nn.Linear(recipe.config.decoder.hidden_size, 2)
        self.patch_weight = recipe.patch_weight
        self.point_weight = recipe.point_weight


def joint_loss(pupil: Pupil, batch: JointBatch) -> tuple[mx.array, mx.array]:
    """Loss of the answers plus the weighted ones of patches and places; answer tokens."""
    mm1 = pupil.mm1
    features = mm1.vision(mx.array(batch.patches.pixels))
    states = batch_states(mm1, batch.rows, list(mm1.connector(features)))
    adjustment = mx.array(batch.adjustment)
    answers, count = states_loss(mm1, batch.rows, states, adjustment)
    patches = patch_loss(pupil.heads, features, batch.patches, balanced=True)
    named = states.flatten(0, 1)[mx.array(batch.mentions.tokens)]
    misses = (pupil.point(named) - mx.array(batch.mentions.places)).square().sum(-1)
    places = misses.sum() / max(1, misses.size)
    loss = answers + pupil.patch_weight * patches + pupil.point_weight * places
    return loss, count
