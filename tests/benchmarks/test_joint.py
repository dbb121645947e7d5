"""The later stages' loss: what each form of batch teaches, each part by its weight."""

import re
from collections import Counter
from dataclasses import replace
from typing import get_args

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from benchmarks.shapes.cases import facts
from benchmarks.shapes.conversations import Conversations, _Whole
from benchmarks.shapes.exchanges import Exchange
from benchmarks.shapes.joint import Pupil, _encoded, joint_loss
from benchmarks.shapes.patches import COLOUR_CLASSES, SHAPE_CLASSES
from benchmarks.shapes.questions import SHAPE_OF
from benchmarks.shapes.recipe import Form
from benchmarks.shapes.scene import COLOURS, HELD_OUT, SHAPES, random_scene, split_rng
from mm1_mlx.train.sample import build_sample

FORMS = get_args(Form)
SCENE = random_scene(split_rng("train", 3), counts=(1,))
WEIGHTS = ("patch_weight", "point_weight", "attribute_weight", "match_weight")


@pytest.fixture
def pupil(recipe):
    mx.random.seed(0)
    return Pupil(recipe)


def loss(pupil, batch, **weights):
    for name in WEIGHTS:
        setattr(pupil, name, weights.get(name, 0.0))
    return joint_loss(pupil, batch)[0].item()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_teaches_the_model(form, pupil, conversations):
    batch = conversations(form)

    def parts(batch):
        value, weight, told = joint_loss(pupil, batch)
        return value, weight, told

    (value, weight, told), gradients = nn.value_and_grad(pupil, parts)(batch)
    assert value.item() == pytest.approx(sum(told.values()).item(), rel=1e-5)
    learned = sum(int(rows.batch.learned.sum()) for rows in batch.rows)
    assert learned == sum(len(rows.weights) for rows in batch.rows)
    assert weight.item() == pytest.approx(
        sum(rows.weights.sum() for rows in batch.rows), rel=1e-5
    )
    flat = dict(tree_flatten(gradients["mm1"]))
    for part in ("vision.patch_embedding", "connector.readout", "decoder.layers.4"):
        found = [g for name, g in flat.items() if name.startswith(part)]
        assert found
        assert all(mx.abs(g).max().item() > 0 for g in found)


@pytest.mark.parametrize(
    ("form", "kinds"),
    [
        ("questions", {"patch_weight", "point_weight"}),
        ("episodes", {"patch_weight", "attribute_weight", "match_weight"}),
        ("pairs", {"patch_weight"}),
        ("parts", {"point_weight"}),
    ],
)
def test_the_weighted_losses_add_up(form, kinds, pupil, conversations):
    batch = conversations(form, step=3)
    answers = loss(pupil, batch)
    alone = {name: loss(pupil, batch, **{name: 1.0}) - answers for name in WEIGHTS}
    assert {name for name, value in alone.items() if value > 1e-6} == kinds
    weights = dict(zip(WEIGHTS, (0.5, 3.0, 2.0, 4.0), strict=True))
    expected = answers + sum(weights[name] * alone[name] for name in WEIGHTS)
    assert loss(pupil, batch, **weights) == pytest.approx(expected, rel=1e-4)


def test_pointing_at_the_very_places_costs_nothing(pupil, conversations):
    batch = conversations("questions")
    pupil.point.weight = mx.zeros_like(pupil.point.weight)
    pupil.point.bias = mx.array([0.25, 0.25])
    shown = replace(
        batch,
        rows=tuple(
            replace(
                rows,
                mentions=replace(
                    rows.mentions, places=np.full_like(rows.mentions.places, 0.25)
                ),
            )
            for rows in batch.rows
        ),
    )
    assert loss(pupil, shown, point_weight=1.0) == loss(pupil, shown)
    assert loss(pupil, batch, point_weight=1.0) > loss(pupil, batch)


def test_answers_are_balanced(pupil, conversations):
    batch = conversations("questions")
    plain = replace(
        batch,
        rows=tuple(
            replace(rows, adjustment=np.zeros_like(rows.adjustment))
            for rows in batch.rows
        ),
    )
    assert loss(pupil, batch) < loss(pupil, plain)


def test_pictures_in_parts_are_encoded_as_the_runtime_does(pupil, conversations):
    batch = conversations("parts")
    ours = _encoded(pupil.mm1, batch)
    for tokens, expected in zip(ours, pupil.mm1.encode(batch.tiled), strict=True):
        np.testing.assert_allclose(tokens, expected, atol=1e-5)


@pytest.mark.parametrize("form", ["pairs", "parts", "episodes"])
def test_an_encoder_that_only_sees_learns_nothing(form, pupil, conversations):
    batch = replace(conversations(form), teaches_encoder=False)
    gradients = nn.value_and_grad(pupil, lambda b: joint_loss(pupil, b)[0])(batch)[1]
    flat = dict(tree_flatten(gradients["mm1"]))
    learned = {n.split(".")[0] for n, g in flat.items() if mx.abs(g).max().item() > 0}
    assert learned == {"connector", "decoder"}


def test_every_form_tells_the_same_parts(pupil, conversations):
    """Processes of a run sum them."""
    told = {tuple(sorted(joint_loss(pupil, conversations(f))[2])) for f in FORMS}
    assert len(told) == 1


def test_a_frozen_encoder_learns_nothing(pupil, conversations):
    batch = conversations("captions")
    pupil.mm1.vision.freeze()
    pupil.heads.freeze()
    value, _, told = joint_loss(pupil, batch)
    # Captions point at what they name.
    assert {name for name, part in told.items() if part.item()} == {"answers", "points"}
    gradients = nn.value_and_grad(pupil, lambda b: joint_loss(pupil, b)[0])(batch)[1]
    assert not tree_flatten(gradients["mm1"].get("vision", {}))
    assert value.item() > 0


@pytest.mark.parametrize("form", ["questions", "talks"])
def test_an_answer_counts_by_its_stage(form, conversations, recipe, tokenizer):
    """Long answers would drown the short ones, were every token to count as much."""
    batch = conversations(form)
    power = recipe.stages[-1].row_power
    assert 0 < power < 1
    answers = 0
    for rows in batch.rows:
        learned = rows.batch.tokens[rows.batch.learned]
        ends = np.flatnonzero(learned == tokenizer.hf.eos_token_id) + 1
        assert ends[-1] == len(learned)
        counts = np.diff(ends, prepend=0)
        sums = np.add.reduceat(rows.weights, ends - counts)
        np.testing.assert_allclose(sums, counts ** (1 - power), rtol=1e-5)
        answers += len(ends)
    # Some follow others.
    assert answers > sum(len(rows.batch.tokens) for rows in batch.rows)


def test_answers_that_follow_one_another_are_balanced_as_they_are_alone(
    recipe, tokenizer
):
    asked = [
        Exchange("What colour is the square?", "blue", ("blue", "square")),
        Exchange("What do you see?", "A blue square."),
    ]
    making = Conversations(recipe, recipe.stages[-1], tokenizer)
    image = [None, asked[0].question]
    turns = [("user", image), ("assistant", [asked[0].answer])]
    turns += [("user", [asked[1].question]), ("assistant", [asked[1].answer])]
    together = making._in_turn(asked, 1)
    assert together.sample == build_sample(turns, recipe.config, tokenizer)
    alone = [making._in_turn([x], 1) for x in asked]
    batches = [
        making._whole([SCENE], [[_Whole(spoken, [0])]]).rows[0]
        for spoken in (together, *alone)
    ]
    both, *each = (rows.adjustment for rows in batches)
    np.testing.assert_array_equal(both, np.concatenate(each))
    # No red square was ever shown, so that blue ones say nothing about it.
    assert all(np.abs(adjustment).max() > 0 for adjustment in each)


def test_nothing_without_a_name_is_talked_about(conversations, tokenizer):
    unnamed = 0
    for form in ("questions", "captions", "reading", "documents", "talks"):
        for step in (0, 1):
            batch = conversations(form, step)
            unnamed += int((batch.patches.colours < 0).sum())
            for rows in batch.rows:
                for row in rows.batch.tokens:
                    assert "unnamed" not in tokenizer.hf.decode(row.tolist()).lower()
    assert unnamed > 100


def test_what_an_example_shows_is_balanced(pupil, conversations):
    """That red is never a square is no evidence against a red square."""
    batch = conversations("episodes")
    # What is told in words is of all pairs.
    batch = replace(batch, rows=tuple(r for r in batch.rows if r.batch.spans))
    assert batch.rows
    never = COLOUR_CLASSES["red"], SHAPE_CLASSES["square"]
    heads = pupil.attributes
    base = loss(pupil, batch, attribute_weight=1.0)
    # Sure of a square wherever something is red: nothing is wrong with that.
    only_red = replace(
        batch,
        rows=tuple(
            replace(
                rows, examples=_of(rows.examples, rows.examples.colours == never[0])
            )
            for rows in batch.rows
        ),
    )
    before = loss(pupil, only_red, attribute_weight=1.0)
    heads.shape.bias = heads.shape.bias + 9.0 * (mx.arange(7) == never[1])
    assert loss(pupil, only_red, attribute_weight=1.0) == pytest.approx(
        before, rel=1e-4
    )
    assert loss(pupil, batch, attribute_weight=1.0) > base + 0.5


def _of(examples, kept):
    if not kept.any():
        return None
    return replace(
        examples,
        tokens=examples.tokens[kept],
        shapes=examples.shapes[kept],
        colours=examples.colours[kept],
    )


def answer_to(question, stated):
    """How many of what a caption states a question asks for."""
    words = re.findall(r"\w+", question)
    shapes = {SHAPE_OF[word] for word in words if word in SHAPE_OF} or {*SHAPES}
    colours = {word for word in words if word in COLOURS} or {*COLOURS}
    return sum(n for (c, s), n in stated.items() if c in colours and s in shapes)


def test_things_told_in_words_are_of_all_pairs_and_asked_about_rightly(
    recipe, tokenizer
):
    def rows_of(told):
        stage = replace(recipe.stages[-1], forms=(("talks",),), told=told)
        return Conversations(recipe, stage, tokenizer)(0, 0).rows

    shown, written = rows_of(80)
    assert not written.batch.spans
    assert not written.adjustment.any()
    pairs, numbers = Counter(), Counter()
    for tokens in written.batch.tokens:
        text = tokenizer.hf.decode(tokens.tolist()).lower()
        told, asked = text.partition("user:")[2].split(".", 1)
        pairs += facts(told)
        for question, answer in re.findall(
            r"(how many[^:]*|count[^:]*)assistant: (\d)", asked
        ):
            assert answer_to(question, facts(told)) == int(answer)
            numbers[answer] += 1
    assert {*pairs} >= HELD_OUT
    assert len(numbers) >= 3
    # What stands beside it stays as it was.
    (alone,) = rows_of(0)
    np.testing.assert_array_equal(alone.batch.tokens, shown.batch.tokens)


def test_pictures_stand_behind_a_question_in_some_talks(recipe, tokenizer):
    """Clients show them so, too."""
    image = recipe.config.prompt.image_token_id
    for behind in (0.0, 0.5, 1.0):
        stage = replace(recipe.stages[-1], forms=(("talks",),), behind=behind, told=0)
        (rows,) = Conversations(recipe, stage, tokenizer)(0, 0).rows
        where = set()
        for tokens in rows.batch.tokens:
            # What stands before the first picture.
            before = tokenizer.hf.decode(
                tokens[: tokens.tolist().index(image)].tolist()
            )
            where.add(len(before.partition("USER:")[2].strip()) > 0)
        assert where == {0.0: {False}, 0.5: {False, True}, 1.0: {True}}[behind]
