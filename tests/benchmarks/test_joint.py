"""The second stage's loss: answers, patches and places, each by its weight."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.shapes.conversations import Conversations
from benchmarks.shapes.joint import Pupil, joint_loss
from benchmarks.shapes.recipe import load_recipe, open_tokenizer


@pytest.fixture(scope="module")
def recipe():
    return replace(load_recipe(), pictures_per_batch=4)


@pytest.fixture(scope="module")
def batch(recipe, tmp_path_factory):
    tokenizer = open_tokenizer(tmp_path_factory.mktemp("tokenizer"), recipe.config)
    return Conversations(recipe, recipe.stages[-1], tokenizer)(0, 0)


@pytest.fixture
def pupil(recipe):
    mx.random.seed(0)
    return Pupil(recipe)


def loss(pupil, batch, **weights):
    for name in ("patch_weight", "point_weight"):
        setattr(pupil, name, weights.get(name, 0.0))
    return joint_loss(pupil, batch)[0].item()


def test_the_weighted_losses_add_up(pupil, batch):
    answers = loss(pupil, batch)
    patches = loss(pupil, batch, patch_weight=1.0) - answers
    places = loss(pupil, batch, point_weight=1.0) - answers
    assert min(answers, patches, places) > 0
    both = loss(pupil, batch, patch_weight=0.5, point_weight=3.0)
    assert both == pytest.approx(answers + 0.5 * patches + 3 * places, rel=1e-4)


def test_pointing_at_the_very_places_costs_nothing(pupil, batch):
    places = batch.mentions.places
    middle = replace(batch.mentions, places=np.full_like(places, 0.25))
    pupil.point.weight = mx.zeros_like(pupil.point.weight)
    pupil.point.bias = mx.array([0.25, 0.25])
    shown = replace(batch, mentions=middle)
    assert loss(pupil, shown, point_weight=1.0) == loss(pupil, shown)
    assert loss(pupil, batch, point_weight=1.0) > loss(pupil, batch)


def test_answers_are_balanced(pupil, batch):
    plain = replace(batch, adjustment=np.zeros_like(batch.adjustment))
    assert loss(pupil, batch) < loss(pupil, plain)


def test_a_batch_that_names_nothing_can_be_learned_from(pupil, batch):
    none = replace(
        batch.mentions,
        tokens=batch.mentions.tokens[:0],
        places=batch.mentions.places[:0],
    )
    assert np.isfinite(loss(pupil, replace(batch, mentions=none), point_weight=1.0))
