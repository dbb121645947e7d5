"""Boxes: where the picture shows what they name, in the runtime's own format."""

import numpy as np

from benchmarks.shapes.boxes import ask_box, box_of
from benchmarks.shapes.draw import draw
from benchmarks.shapes.scene import Background, Scene, random_scene, split_rng
from mm1_mlx.grounding import parse_boxes

WHITE = Background((255, 255, 255), (255, 255, 255))


def test_boxes_hold_what_is_drawn_and_no_more():
    for seed in range(60):
        scene = random_scene(split_rng("train", seed), short_side=200)
        for item in scene.objects:
            dark = Scene(
                (type(item)(**{**vars(item), "rgb": (0, 0, 0), "style": "solid"}),),
                WHITE, scene.width, scene.height,
            )  # fmt: skip
            ink = np.argwhere(np.array(draw(dark)).min(axis=2) < 128)
            (top, left), (bottom, right) = ink.min(axis=0), ink.max(axis=0) + 1
            seen = np.array([left, top, right, bottom]) * 1000
            seen = seen / ([scene.width, scene.height] * 2)
            np.testing.assert_allclose(box_of(item, scene), seen, atol=12)


def test_answers_are_read_by_the_runtime():
    asked = 0
    for seed in range(60):
        rng = split_rng("held_out", seed)
        scene = random_scene(rng, "held_out", 200)
        if (q := ask_box(scene, rng)) is None:
            continue
        (found,) = parse_boxes(q.answer, (1000, 1000))
        assert found.box == box_of(q.target, scene)
        assert found.label.removeprefix("The ") in q.text
        asked += 1
    assert asked > 40
