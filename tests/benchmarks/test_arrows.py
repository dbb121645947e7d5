"""The task that the embedded model cannot do: its answers, and the rows that teach it."""

import json
import re
from collections import Counter

from PIL import Image

from benchmarks.shapes.arrows import ARROW, arrow_cases, arrow_questions, arrow_scene
from benchmarks.shapes.cases import facts
from benchmarks.shapes.fine_tune import write_rows
from benchmarks.shapes.questions import caption
from benchmarks.shapes.scene import COLOURS, SHAPES, split_rng


def test_nothing_else_knows_of_arrows():
    assert ARROW not in SHAPES
    assert not facts("A red arrow.")


def test_answers_follow_from_the_scene():
    asked = Counter()
    for seed in range(300):
        rng = split_rng("train", seed)
        scene = arrow_scene(rng)
        arrows = [item for item in scene.objects if item.shape == ARROW]
        for kind, text, answer, _ in arrow_questions(scene, rng):
            asked[kind, answer] += 1
            if kind == "shape":
                colours = set(COLOURS) & set(re.findall(r"\w+", text))
                fitting = [o for o in scene.objects if o.colour in (colours or COLOURS)]
                assert [o.shape for o in fitting] == [answer] == [ARROW]
            elif kind == "colour":
                assert [o.colour for o in arrows] == [answer]
            elif kind == "exists":
                assert answer == ("yes" if arrows else "no")
            elif kind == "count":
                assert answer == str(len(arrows))
            else:
                assert answer == caption(scene)[1]
                assert ARROW in answer
    assert min(asked["exists", answer] for answer in ("yes", "no")) > 60
    assert min(asked["count", answer] for answer in "012") > 30


def test_cases_and_rows_share_no_picture(tmp_path):
    rows = [
        json.loads(line)
        for line in write_rows(tmp_path / "data", 20).read_text().splitlines()
    ]
    assert len(rows) > 60
    shown = {
        Image.open(tmp_path / "data" / row["image"]).convert("RGB").tobytes()
        for row in rows
    }
    assert len(shown) == 40
    cases = list(arrow_cases(20))
    assert not shown & {case.pictures[0].tobytes() for case in cases}
    said = [row["conversations"][1]["value"].lower() for row in rows]
    assert 5 < sum(ARROW in text for text in said) < len(rows) / 2
