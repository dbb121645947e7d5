"""A name in a question points at the one object that answers to it."""

import numpy as np
import pytest

from benchmarks.shapes.conversations import Conversations
from benchmarks.shapes.mentions import MentionFinder, place
from benchmarks.shapes.recipe import load_recipe, open_tokenizer
from benchmarks.shapes.scene import Background, Object, Scene

WHITE = Background((255, 255, 255), (255, 255, 255))
RED = Object("star", "red", (255, 0, 0), 20, 30, 9, 0, "solid")
BLUE = Object("star", "blue", (0, 0, 255), 60, 40, 9, 0, "solid")
CROSS = Object("cross", "unnamed", (90, 200, 190), 40, 70, 9, 0, "solid")
SCENE = Scene((RED, CROSS, BLUE), WHITE, 80, 100)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    recipe = load_recipe()
    tokenizer = open_tokenizer(tmp_path_factory.mktemp("tokenizer"), recipe.config)
    return Conversations(recipe, recipe.stages[-1], tokenizer)


@pytest.mark.parametrize(
    ("question", "named"),
    [
        ("Where is the red star relative to the cross?", [RED, CROSS]),
        ("Is the blue object above the red shape or below it?", [BLUE, RED]),
        ("Which shape is blue?", [BLUE]),
        ("what shape is the red one?", [RED]),
        ("Is there a blue cross?", []),
        ("What colour is the star?", []),  # Two answer to it.
        ("How many stars are there?", []),
        ("What shape is this?", []),
    ],
)
def test_names_are_found(question, named, conversations):
    # The answer's own words are no question.
    sample = conversations.row(((question, "red star", None),))
    rows = conversations.collate([sample], [[0]])
    found = MentionFinder(conversations.tokenizer)(rows, [SCENE])
    places = np.array([place(SCENE, item) for item in named]).reshape(-1, 2)
    np.testing.assert_allclose(found.places, places, atol=1e-6)
    assert not rows.learned.flatten()[found.tokens].any()


def test_places_are_of_the_square_that_the_encoder_sees():
    assert place(SCENE, RED) == pytest.approx((-0.2, -0.2))
    wide = Scene((RED,), WHITE, 200, 100)
    assert place(wide, RED) == pytest.approx((-0.4, -0.1))


def test_most_rows_of_a_batch_name_something(conversations):
    batch = conversations(0, 0)
    T = batch.rows.tokens.shape[1]
    naming = np.unique(batch.mentions.tokens // T)
    assert len(naming) > 0.5 * len(batch.rows.tokens)
    assert np.abs(batch.mentions.places).max() < 0.5
