"""A name in a question points at the one object that answers to it."""

import numpy as np
import pytest

from benchmarks.shapes.mentions import MentionFinder, place
from benchmarks.shapes.scene import Background, Object, Scene
from mm1_mlx.train.sample import build_sample, collate

WHITE = Background((255, 255, 255), (255, 255, 255))
RED = Object("star", "red", (255, 0, 0), 20, 30, 9, 0, "solid")
BLUE = Object("star", "blue", (0, 0, 255), 60, 40, 9, 0, "solid")
CROSS = Object("cross", "unnamed", (90, 200, 190), 40, 70, 9, 0, "solid")
SCENE = Scene((RED, CROSS, BLUE), WHITE, 80, 100)


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
def test_names_are_found(question, named, recipe, tokenizer):
    # The answer's own words are no question.
    turns = [("user", [None, question]), ("assistant", ["red star"])]
    sample = build_sample(turns, recipe.config, tokenizer)
    rows = collate([sample], [[0]], (), recipe.config, tokenizer)
    found = MentionFinder(tokenizer)(rows, [SCENE])
    places = np.array([place(SCENE, item) for item in named]).reshape(-1, 2)
    np.testing.assert_allclose(found.places, places, atol=1e-6)
    assert not rows.learned.flatten()[found.tokens].any()
    assert MentionFinder(tokenizer)(rows, [None]).tokens.size == 0


@pytest.mark.parametrize(
    ("answer", "before"),
    [
        ("A red star, a blue star and a black heart.", ["A", "red", "a", "blue"]),
        ("The red star is left of the cross.", ["The", "red"]),
        ("Two red stars.", []),
        ("star", []),
    ],
)
def test_an_answer_points_before_it_names_a_pair(answer, before, recipe, tokenizer):
    turns = [("user", [None, "the cross"]), ("assistant", [answer])]
    sample = build_sample(turns, recipe.config, tokenizer)
    rows = collate([sample], [[0]], (), recipe.config, tokenizer)
    found = MentionFinder(tokenizer, ahead=True)(rows, [SCENE])
    words = [tokenizer.hf.decode([t]).strip() for t in rows.tokens[0][found.tokens]]
    assert words == ["cross", *before]
    items = [CROSS, RED, RED, BLUE, BLUE][: len(words)]
    places = np.array([place(SCENE, item) for item in items])
    np.testing.assert_allclose(found.places, places, atol=1e-6)


def test_places_are_of_the_square_that_the_encoder_sees():
    assert place(SCENE, RED) == pytest.approx((-0.2, -0.2))
    wide = Scene((RED,), WHITE, 200, 100)
    assert place(wide, RED) == pytest.approx((-0.4, -0.1))


def test_many_rows_of_a_batch_name_something(conversations):
    naming, rows = 0, 0
    for some in conversations("questions").rows:
        T = some.batch.tokens.shape[1]
        naming += len(np.unique(some.mentions.tokens // T))
        rows += len(some.batch.tokens)
        assert np.abs(some.mentions.places).max() < 0.5
    assert naming > 0.3 * rows
