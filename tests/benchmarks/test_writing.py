"""Drawn words and numbers: where they are, and which of them training never shows."""

import numpy as np
import pytest

from benchmarks.shapes.draw import draw, letter_places
from benchmarks.shapes.patches import LETTER_CLASSES, letter_classes
from benchmarks.shapes.reading import ask_reading
from benchmarks.shapes.scene import Background, Label, Scene, split_rng
from benchmarks.shapes.writing import (
    HELD_OUT_WORDS,
    LARGE,
    MAX_LENGTH,
    SMALL,
    WORDS,
    is_held_out,
    writing_scene,
)

WHITE = Background((255, 255, 255), (255, 255, 255))


def scenes(split, count, heights=LARGE, side=96):
    for seed in range(count):
        rng = split_rng(split, seed)
        yield writing_scene(rng, split, side, heights), rng


def test_training_never_shows_a_held_out_word_or_number():
    shown = {label.text for scene, _ in scenes("train", 2000) for label in scene.labels}
    assert not any(map(is_held_out, shown))
    assert shown & set(WORDS)
    for scene, _ in scenes("held_out", 300):
        assert all(is_held_out(label.text) for label in scene.labels)
    assert len(HELD_OUT_WORDS) == pytest.approx(len(WORDS) / 5, abs=1)
    assert max(map(len, WORDS)) <= MAX_LENGTH


@pytest.mark.parametrize("heights", [LARGE, SMALL])
def test_labels_are_on_the_canvas_and_nothing_covers_them(heights):
    for scene, _ in scenes("train", 300, heights, 192):
        for label in scene.labels:
            alone = Scene((), WHITE, scene.width, scene.height, (label,))
            ink = np.argwhere(np.array(draw(alone)).min(axis=2) < 250)
            # Not cut: there is paper around it.
            assert ink.min() >= 0
            assert (ink.max(axis=0) < [scene.height, scene.width]).all()
            assert label.x == pytest.approx(
                (ink[:, 1].min() + ink[:, 1].max()) / 2, abs=6
            )
            for item in scene.objects:
                distance = np.hypot(ink[:, 1] - item.x, ink[:, 0] - item.y).min()
                assert distance > item.radius - 1


def test_letters_are_as_high_as_they_say():
    label = Label("HEX", (0, 0, 0), 100, 60, 40)
    ink = np.argwhere(
        np.array(draw(Scene((), WHITE, 200, 120, (label,)))).min(axis=2) < 128
    )
    assert np.ptp(ink[:, 0]) == pytest.approx(40, abs=2)


def test_patches_know_the_letters_on_them():
    label = Label("XY7", (0, 0, 0), 48, 48, 20)
    scene = Scene((), WHITE, 96, 96, (label,))
    letters = letter_classes(scene, 12, 96).reshape(12, 12)
    for letter, x in zip(label.text, letter_places(label), strict=True):
        assert letters[5, int(x / 8)] == LETTER_CLASSES[letter]
    assert letters[0].max() == letters[-1].max() == 0
    # At half the size they are too small to be told, and count for nothing.
    half = letter_classes(Scene((), WHITE, 288, 288, (label,)), 12, 96)
    assert set(half.tolist()) == {0, -1}


def test_one_of_two_labels_is_asked_about_by_its_kind():
    seen = set()
    for scene, rng in scenes("train", 300):
        q = ask_reading(scene, rng)
        assert q.answer in [label.text for label in scene.labels]
        if len(scene.labels) == 2:
            assert ("number" in q.text) == q.answer.isdigit()
            assert ("word" in q.text) != q.answer.isdigit()
        seen.add(q.text)
    assert len(seen) == 12
