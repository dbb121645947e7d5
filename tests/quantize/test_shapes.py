"""mm1-tiny's own questions have the right answers, and count as they should."""

import re
from collections import Counter

import numpy as np
import pytest
from PIL import ImageColor

from mm1_mlx.checkpoint import load_config, load_model
from mm1_mlx.quantize import find_recipe, quantize, shapes
from mm1_mlx.quantize.shapes import (
    COLOURS,
    SHAPES,
    Accuracy,
    case,
    score,
    things_of,
)
from mm1_mlx.runtime import TINY
from mm1_mlx.tokenizer import load_tokenizer

CASES = [(case(seed), things_of(seed)) for seed in range(400)]


def named(things, colour, shape):
    (found,) = [x for x in things if (x.colour, x.shape) == (colour, shape)]
    return found


def expected(question, things):
    """The answer by another road: from the question's words alone."""
    words = re.findall(r"\w+", question)
    colours = [word for word in words if word in COLOURS]
    kinds = [word for word in words if word in SHAPES]
    match words[:2]:
        case ["What", "colour"]:
            (thing,) = [x for x in things if x.shape == kinds[0]]
            return thing.colour
        case ["Which", "shape"]:
            (thing,) = [x for x in things if x.colour == colours[0]]
            return thing.shape
        case ["How", "many"]:
            wanted = colours or COLOURS
            return str(sum(x.colour in wanted for x in things))
        case ["Is", "there"]:
            pairs = [(x.colour, x.shape) for x in things]
            return "yes" if (colours[0], kinds[0]) in pairs else "no"
        case ["Where", "is"]:
            a, b = (named(things, *pair) for pair in zip(colours, kinds, strict=True))
            across = abs(a.x - b.x) > abs(a.y - b.y)
            if across:
                return "left" if a.x < b.x else "right"
            return "above" if a.y < b.y else "below"
    raise AssertionError(question)


def test_every_answer_is_the_pictures():
    for drawn, things in CASES:
        assert drawn.answer == expected(drawn.question, things), drawn.question


def test_every_kind_is_asked_and_no_answer_prevails():
    kinds = Counter(" ".join(drawn.question.split()[:2]) for drawn, _ in CASES)
    assert len(kinds) == 5
    assert min(kinds.values()) > 40
    answers = Counter(drawn.answer for drawn, _ in CASES)
    assert max(answers.values()) < 0.2 * len(CASES)


def test_things_are_drawn_where_they_are_in_their_colour():
    for drawn, things in CASES[:100]:
        pixels = np.asarray(drawn.picture).astype(int)
        side = len(pixels)
        for thing in things:
            # The middle of a triangle and of a heart is inside of them, too.
            x, y = (round(side * place) for place in (thing.x, thing.y))
            assert tuple(pixels[y, x]) == ImageColor.getrgb(thing.colour)
            assert thing.radius <= min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)
        for i, a in enumerate(things):
            for b in things[:i]:
                assert np.hypot(a.x - b.x, a.y - b.y) > 0.9 * max(a.radius, b.radius)


def test_a_seed_gives_one_picture():
    one, again, other = case(1), case(1), case(2)
    assert one.question == again.question
    assert np.array_equal(one.picture, again.picture)
    assert not np.array_equal(one.picture, other.picture)


def test_the_interval_is_wilsons():
    # Newcombe 1998, table I: 81 of 263, and 0 of 20.
    assert Accuracy(81, 263).interval == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert Accuracy(0, 20).interval == pytest.approx((0, 0.1611), abs=1e-4)


@pytest.fixture(scope="module")
def tiny():
    model = load_model(TINY)
    return model, load_tokenizer(TINY, model.config.prompt)


def test_the_embedded_model_knows_them(tiny):
    accuracy = score(*tiny, questions=60)
    assert accuracy.questions == 60
    assert accuracy.share > 0.95


def test_a_wrong_answer_is_not_counted(tiny, monkeypatch):
    monkeypatch.setattr(shapes, "_answer", lambda *_: "yes")
    right = sum(drawn.answer == "yes" for drawn, _ in CASES[:60])
    assert score(*tiny, questions=60) == Accuracy(right, 60)
    assert right < 20


def test_only_the_embedded_model_is_asked(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("mm1_mlx.quantize.job.QUESTIONS", 12)
    recipe = find_recipe("4bit")
    other = quantize(dense, tmp_path / "other", recipe, count=4)
    assert other.accuracy is None
    before, after = quantize(TINY, tmp_path / "tiny", recipe, count=4).accuracy
    assert (before.questions, after.questions) == (12, 12)
    assert load_config(tmp_path / "tiny").quantization.bits == 4


def test_few_bits_cost_right_answers(tmp_path, monkeypatch):
    monkeypatch.setattr("mm1_mlx.quantize.job.QUESTIONS", 40)
    before, after = quantize(
        TINY, tmp_path / "two", find_recipe("mixed_2_6"), count=4
    ).accuracy
    assert after.right < before.right
