"""The procedural benchmark: what it draws is what it says, and held out is held out."""

import json
import math
import re
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.shapes import evaluate as shapes_evaluate
from benchmarks.shapes.cases import Case, normalise, plain_cases, scene_cases
from benchmarks.shapes.draw import draw
from benchmarks.shapes.evaluate import evaluate
from benchmarks.shapes.exchanges import ask
from benchmarks.shapes.joint import Pupil
from benchmarks.shapes.patches import COLOUR_CLASSES, SHAPE_CLASSES, patch_classes
from benchmarks.shapes.positions import sine_cosine_positions
from benchmarks.shapes.questions import ask_place, caption, questions
from benchmarks.shapes.recipe import (
    load_recipe,
    open_tokenizer,
    picture_rng,
    random_picture_scene,
)
from benchmarks.shapes.scene import (
    COLOURS,
    HELD_OUT,
    MIN_UNNAMED,
    SHAPES,
    Background,
    Object,
    Scene,
    contrast,
    random_scene,
    split_rng,
    unnamed_rgb,
)
from benchmarks.shapes.train import make_trainer, show_places
from mm1_mlx.files import sha256
from mm1_mlx.models import MM1
from mm1_mlx.runtime import TINY


def scenes(split, count):
    for seed in range(count):
        rng = split_rng(split, seed)
        yield random_scene(rng, split), rng


def test_a_seed_decides_the_picture():
    first, second = (
        draw(random_scene(split_rng("train", 7), "train")).tobytes() for _ in range(2)
    )
    assert first == second
    other = draw(random_scene(split_rng("train", 8), "train")).tobytes()
    assert first != other


def test_training_never_shows_a_held_out_pair():
    for scene, _ in scenes("train", 3000):
        assert not {item.pair for item in scene.objects} & HELD_OUT
    rng = picture_rng(0, 0, 0)
    for _ in range(3000):
        scene = random_picture_scene(rng, (0.0, 0.5))
        assert not {item.pair for item in scene.objects} & HELD_OUT


def test_held_out_scenes_always_show_one():
    for scene, _ in scenes("held_out", 1000):
        assert {item.pair for item in scene.objects} & HELD_OUT


def test_every_colour_and_shape_is_seen_and_each_colour_held_out_once():
    assert Counter(colour for colour, _ in HELD_OUT) == dict.fromkeys(COLOURS, 1)
    seen = {item.pair for scene, _ in scenes("train", 3000) for item in scene.objects}
    assert len(seen) == len(COLOURS) * len(SHAPES) - len(HELD_OUT)


def test_splits_do_not_share_pictures():
    drawn = [
        {draw(scene).tobytes() for scene, _ in scenes(split, 40)}
        for split in ("train", "validation", "held_out")
    ]
    assert len(set.union(*drawn)) == 120


def test_objects_neither_touch_nor_leave_the_canvas():
    for scene, _ in scenes("train", 500):
        for i, a in enumerate(scene.objects):
            assert a.radius <= a.x <= scene.width - a.radius
            assert a.radius <= a.y <= scene.height - a.radius
            for b in scene.objects[i + 1 :]:
                assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_solid_object_has_its_colour_at_its_centre(shape, colour):
    rgb = COLOURS[colour][0][0]
    item = Object(shape, colour, rgb, 48, 48, 30, 25, "solid")
    white = Background((255, 255, 255), (255, 255, 255))
    picture = np.array(draw(Scene((item,), white, 96, 96)))
    assert np.abs(picture[48, 48].astype(int) - rgb).max() <= 2
    assert (picture[2, 2] == 255).all()


def test_answers_follow_from_the_scene():
    for scene, rng in scenes("held_out", 400):
        for q in questions(scene, rng):
            assert q.answer in q.options
            if q.kind == "colour":
                assert q.target.colour == q.answer
                same = [o for o in scene.objects if o.shape == q.target.shape]
                assert len(same) == 1
            elif q.kind == "shape":
                assert q.target.shape == q.answer
                same = [o for o in scene.objects if o.colour == q.target.colour]
                assert len(same) == 1
            elif q.kind == "exists":
                assert (q.answer == "yes") == is_there(scene, q.text)
            elif q.kind == "count":
                assert int(q.answer) == count(scene, q.text)


def is_there(scene, text):
    words = text.lower().strip("?.").split()
    return any(
        (o.colour in words or not set(COLOURS) & set(words))
        and (o.shape in words or not set(SHAPES) & set(words))
        for o in scene.objects
    )


def count(scene, text):
    words = [w.strip("?.") for w in text.lower().split()]
    shapes = {s for s in SHAPES if {s + "s", s + "es"} & set(words)}
    return sum(
        (o.colour in words or not set(COLOURS) & set(words))
        and (o.shape in shapes or not shapes)
        for o in scene.objects
    )


# "the red star", "the star", "the red object", as a reader finds them.
NAME = re.compile(
    rf"\bthe (?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)}|object|one|shape)\b"
)
SIDE_WORDS = {
    **{side: side for side in ("left", "right", "above", "below")},
    "higher": "above",
    "lower": "below",
}


def named(scene, text):
    """The objects that each of the text's names fits."""
    return [
        [
            item
            for item in scene.objects
            if colour in ("", item.colour)
            and (noun == item.shape or noun not in SHAPES)
        ]
        for colour, noun in NAME.findall(text)
    ]


def test_questions_name_what_they_are_about():
    for scene, rng in scenes("held_out", 400):
        for q in questions(scene, rng):
            if q.kind == "colour":
                assert named(scene, q.text) in ([], [[q.target]])
            elif q.kind == "shape":
                words = set(q.text.strip("?").split())
                colours = set(COLOURS) & words or set(COLOURS)
                assert [o for o in scene.objects if o.colour in colours] == [q.target]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_where_is_answered_about_the_two_that_are_named(split):
    forms = Counter()
    for scene, rng in scenes(split, 700):
        for q in questions(scene, rng):
            if q.kind != "where":
                continue
            (a,), (b,) = named(scene, q.text)
            if q.text.startswith("On which side of"):
                a, b = b, a
            assert a is q.target
            (side,) = (s for s in ("left", "right", "above", "below") if lies(a, b, s))
            said = {
                SIDE_WORDS[w] for w in re.findall(r"\w+", q.text) if w in SIDE_WORDS
            }
            if q.options == ("yes", "no"):
                assert q.answer == ("yes" if said == {side} else "no")
                forms[f"claim, {q.answer}"] += 1
            else:
                assert q.answer == side
                assert not said or said == set(q.options)
                forms["either" if said else "open"] += 1
    assert len(forms) == 4
    assert min(forms.values()) > 10


def lies(a, b, side):
    dx, dy = a.x - b.x, a.y - b.y
    along = {"left": -dx, "right": dx, "above": -dy, "below": dy}[side]
    across = abs(dy) if side in ("left", "right") else abs(dx)
    return along >= 1.5 * across


def test_halves_are_clear_in_the_picture():
    answers = Counter()
    for scene, rng in scenes("train", 400):
        q = ask_place(scene, rng)
        if q is None:
            continue
        answers[q.answer] += 1
        across, down = q.target.x / scene.width, q.target.y / scene.height
        shares = {"left": 1 - across, "right": across, "above": 1 - down, "below": down}
        assert shares[q.answer] >= 0.6
    assert min(answers[side] for side in ("left", "right", "above", "below")) > 30


def test_yes_and_no_are_balanced():
    answers = Counter(
        q.answer
        for scene, rng in scenes("held_out", 1500)
        for q in questions(scene, rng)
        if q.kind == "exists"
    )
    assert 0.45 < answers["yes"] / answers.total() < 0.55


def test_a_caption_states_every_object_and_nothing_else():
    numbers = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
    several = 0
    for scene, rng in scenes("train", 400):
        _, sentence = caption(scene, rng)
        assert sentence[0].isupper()
        assert sentence.endswith(".")
        stated = Counter()
        for part in re.split(", | and ", sentence[:-1].lower()):
            number, colour, noun = part.split()
            plural = "" if numbers[number] == 1 else "es" if "cross" in noun else "s"
            assert (number == "an") == (colour == "orange" and not plural)
            stated[colour, noun.removesuffix(plural)] += numbers[number]
            several += numbers[number] > 1
        assert stated == Counter(item.pair for item in scene.objects)
        # From left to right.
        firsts = list(dict.fromkeys(item.pair for item in scene.objects))
        assert list(stated) == firsts
    assert several > 20


def test_patch_classes_lie_on_the_objects():
    red = Object("star", "red", (255, 0, 0), 20, 20, 12, 0, "solid")
    blue = Object("heart", "blue", (0, 0, 255), 70, 76, 12, 0, "solid")
    white = Background((255, 255, 255), (255, 255, 255))
    shapes, colours = patch_classes(Scene((red, blue), white, 96, 96), 12)
    shapes, colours = shapes.reshape(12, 12), colours.reshape(12, 12)
    assert (shapes[2, 2], colours[2, 2]) == (
        SHAPE_CLASSES["star"],
        COLOUR_CLASSES["red"],
    )
    assert shapes[9, 8] == SHAPE_CLASSES["heart"]
    assert shapes[0, 11] == shapes[11, 0] == 0
    # A tall picture stands in the middle of its square: x moves by a quarter.
    shapes, _ = patch_classes(Scene((red,), white, 48, 96), 12)
    assert shapes.reshape(12, 12)[2, 5] == SHAPE_CLASSES["star"]


def test_evaluation_counts_and_knows_chance():
    cases = [
        Case("colour", (), "a?", "red", ("red", "blue")),
        Case("colour", (), "b?", "blue", ("red", "blue"), frozenset({"red"})),
        Case("caption", (), "c?", "A red star."),
        Case("place", (), "d?", "left", ("left", "right")),
    ]
    figures = evaluate(lambda asked: [" Red "] * len(asked), cases)
    assert figures["colour"]["accuracy"] == 0.5
    assert figures["colour"]["chance_uniform"] == 0.5
    assert figures["colour"]["answered_unseen_pair"] == 0.5
    assert figures["caption"]["accuracy"] == figures["place"]["accuracy"] == 0
    assert figures["all questions"]["n"] == 2
    assert normalise(" A red star. ") == "a red star."


def test_figures_of_one_part_leave_those_of_others_in_their_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    chance = {"chance_uniform": 0.0, "chance_majority": 0.1}
    row = shapes_evaluate.counted(3, 5) | chance
    rows = {"read": row, "plain shape": row}
    digest = sha256(TINY / "model.safetensors")
    path.write_text(json.dumps({"model": digest, "figures": rows}))
    monkeypatch.setattr(
        shapes_evaluate, "answerer", lambda *_: lambda asked: ["circle"] * len(asked)
    )
    words = f"evaluate --part plain --json {path}"
    monkeypatch.setattr("sys.argv", words.split())
    shapes_evaluate.main()
    whole = json.loads(path.read_text())
    assert whole["model"] == digest
    assert whole["figures"]["read"] == row
    assert whole["figures"]["plain shape"]["accuracy"] == 0.25
    path.write_text(json.dumps(whole | {"model": "another"}))
    with pytest.raises(SystemExit, match="of another model"):
        shapes_evaluate.main()


def test_cases_know_which_answers_training_never_showed():
    asked = {"colour": 0, "shape": 0}
    for case in scene_cases(60, "held_out"):
        if case.kind in asked:
            asked[case.kind] += 1
            assert case.expected in case.unseen
    assert min(asked.values()) > 20
    for case in scene_cases(60, "validation"):
        assert case.expected not in case.unseen


def test_plain_pictures_show_every_colour_and_shape_without_smoothing():
    cases = list(plain_cases())
    assert len(cases) == 2 * 8 * 4 * 3 * 3
    assert {len(case.pictures[0].getcolors()) for case in cases} == {2}


def test_unnamed_colours_are_far_from_every_named_one():
    rng = split_rng("train", 5)
    white = Background((255, 255, 255), (255, 255, 255))
    named = [value for values, _ in COLOURS.values() for value in values]
    for _ in range(300):
        rgb = unnamed_rgb(white, rng)
        assert min(contrast(rgb, value) for value in named) >= MIN_UNNAMED
        assert not any(
            all(a <= c <= z for a, c, z in zip(low, rgb, high, strict=True))
            for _, boxes in COLOURS.values()
            for low, high in boxes
        )


def test_relations_are_asked_often_enough_to_be_learned():
    rng = split_rng("train", 4)
    sides = ("left", "right", "above", "below")
    asked = [x for scene, _ in scenes("train", 200) for x in ask(scene, rng, 9)]
    about = [
        any(side in x.question or side == x.answer for side in sides) for x in asked
    ]
    assert 0.15 < sum(about) / len(asked) < 0.5


def test_positions_tell_near_from_far_along_both_sides():
    table = np.array(sine_cosine_positions(12, 96)).reshape(12, 12, 96)
    assert np.abs(table.mean(axis=(0, 1))).max() < 1e-6
    for places in (table[5], table[:, 5]):
        distances = np.linalg.norm(places - places[0], axis=1)
        assert (np.diff(distances[:4]) > 0).all()
        assert distances[4:].min() > distances[3] * 0.9
    # A column is the same in every row, but for the half that tells the row.
    assert np.array_equal(table[0, :, :48], table[7, :, :48])
    assert np.array_equal(table[:, 0, 48:], table[:, 7, 48:])


def test_the_stages_train_one_model(tmp_path):
    recipe = load_recipe()
    tokenizer = open_tokenizer(tmp_path, recipe.config)
    pupil = Pupil(recipe)
    first, *later = (
        make_trainer(stage, recipe, pupil, tokenizer, tmp_path).model
        for stage in recipe.stages
    )
    assert first.vision is pupil.mm1.vision
    assert first.heads is pupil.heads
    assert all(model is pupil for model in later)


def test_showing_places_changes_the_connectors_positions_alone():
    mm1 = MM1(load_recipe().config)
    before = dict(mm1.tensors())
    show_places(mm1, 2.0)
    changed = [k for k, v in mm1.tensors().items() if not mx.array_equal(v, before[k])]
    assert changed == ["connector.position_embedding"]
