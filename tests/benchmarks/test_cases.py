"""What is right, and how it is judged."""

from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.shapes import cases
from benchmarks.shapes.cases import (
    PARTS,
    Case,
    facts,
    part_cases,
    scene_cases,
    states_only_facts,
    strict_word_cases,
    talk_cases,
    word_cases,
)
from benchmarks.shapes.evaluate import evaluate
from benchmarks.shapes.questions import caption
from benchmarks.shapes.scene import HELD_OUT, random_scene, split_rng


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("A red star and two blue circles.", True),
        ("Two blue circles and a red star.", True),
        ("A red star.", True),
        ("A blue circle and a red star.", True),
        ("Three blue circles.", False),
        ("A red star and a green heart.", False),
        ("A red star and a red star.", False),
        ("A red star and a big house.", False),
        ("", False),
        ("red", False),
    ],
)
def test_a_caption_may_leave_out_but_not_make_up(answer, right):
    assert states_only_facts(answer, "A red star and two blue circles.") == right


def test_facts_of_a_caption_are_the_scenes():
    for seed in range(200):
        rng = split_rng("train", seed)
        scene = random_scene(rng)
        _, sentence = caption(scene, rng)
        assert facts(sentence) == Counter(item.pair for item in scene.objects)
        assert states_only_facts(sentence, sentence)


def test_boxes_are_judged_by_their_overlap():
    case = Case("box", (), "?", "The star [100, 100, 300, 300].", judge="box")
    assert case.is_right("The star [120, 110, 310, 300].")
    assert not case.is_right("The star [300, 300, 400, 400].")
    assert not case.is_right("The star.")


@pytest.mark.parametrize("part", PARTS)
def test_the_expected_answers_are_right_and_nothing_else_is(part):
    asked_for = list(part_cases(part, 20))
    if part != "plain":
        assert set(Counter(case.kind for case in asked_for).values()) == {20}
    asked = evaluate(lambda some: [case.expected for case in some], asked_for)
    assert {row["accuracy"] for row in asked.values()} == {1.0}
    wrong = evaluate(lambda some: ["no idea"] * len(some), asked_for)
    assert {row["accuracy"] for row in wrong.values()} == {0.0}


def test_new_words_have_as_many_examples_as_they_say():
    for shots in (4, 8):
        for case in word_cases(20, shots):
            assert len(case.shots) == shots
            assert {word for _, word in case.shots} == set(case.options)
            assert case.expected in case.options


def test_words_of_held_out_pairs_are_asked_for_and_strict_ones_are_shown_by_them_too(
    monkeypatch,
):
    pairs = []
    drawn = cases._picture_of
    monkeypatch.setattr(
        cases,
        "_picture_of",
        lambda pair, *more: pairs.append(pair) or drawn(pair, *more),
    )
    asked, examples = set(), set()
    for case in word_cases(30, 4):
        *shown, query = pairs[-5:]
        asked.add(query)
        examples.update(shown)
        assert len(case.shots) == 4
    assert asked <= HELD_OUT
    assert len(asked) > 4
    assert len(examples & HELD_OUT) > 4
    assert len(examples - HELD_OUT) > 20
    pairs.clear()
    assert len(list(strict_word_cases(20, 4))) == 20
    assert {colour + " " + shape for colour, shape in pairs} == {
        "blue triangle",
        "pink triangle",
        "orange heart",
        "black heart",
    }
    pairs.clear()
    assert len(list(word_cases(20, 4, "validation"))) == 20
    assert HELD_OUT.isdisjoint(pairs)


def test_who_sees_nothing_knows_of_a_new_word_only_which_was_told_first():
    some = list(word_cases(40, 4))
    assert {case.blind[0] for case in some} == {("told first", "told later")}
    first = [case.shots[0][1] == case.expected for case in some]
    assert [case.blind[1] == "0" for case in some] == first
    (row,) = evaluate(lambda asked: ["?"] * len(asked), some).values()
    assert row["chance_majority"] == max(sum(first), 40 - sum(first)) / 40


@pytest.mark.parametrize("kind", ["caption", "box"])
def test_no_answer_that_is_always_the_same_is_right_more_often_than_chance(kind):
    some = [case for case in scene_cases(60) if case.kind == kind]
    said = [*cases.ONE_FACT, *(case.expected for case in some)]
    best = max(sum(case.is_right(text) for case in some) for text in said)
    (row,) = evaluate(lambda asked: ["?"] * len(asked), some).values()
    assert row["chance_majority"] == round(best / 60, 4) > 1 / 60


def test_a_talk_goes_on_about_its_last_picture():
    some = list(talk_cases(30))
    for case in some:
        pictures = [p for shown, _, _ in case.before for p in shown]
        if case.kind == "follow-up":
            assert case.pictures == ()
            assert len(pictures) == 1
            assert 1 <= len(case.before) <= 3
            assert case.question not in {asked for _, asked, _ in case.before}
        else:
            assert len(case.pictures) == 1
            assert len(pictures) == len(case.before) == 2


def test_talks_that_differ_in_what_came_before_are_asked_apart():
    some = [case for case in talk_cases(10) if case.kind == "follow-up"]
    same = [replace(case, question="What do you see?") for case in some]
    asked = []
    evaluate(lambda cases: asked.extend(cases) or ["no"] * len(cases), same)
    assert len(asked) == 10
