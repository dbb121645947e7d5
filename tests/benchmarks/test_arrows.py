"""The task that the embedded model cannot do: its answers, and the rows that teach it."""

import json
import re
from collections import Counter

from PIL import Image

from benchmarks.shapes.arrows import ARROW, arrow_cases, arrow_questions, arrow_scene
from benchmarks.shapes.cases import facts
from benchmarks.shapes.fine_tune import lost_most, verdict, write_rows
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
                assert [o.shape for o in fitting] == [answer]
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
    others = sum(asked["shape", answer] for answer in SHAPES)
    assert 0.4 < asked["shape", ARROW] / (asked["shape", ARROW] + others) < 0.6
    assert min(asked["count", answer] for answer in "012") > 30


def test_cases_and_rows_share_no_picture(tmp_path):
    rows = [
        json.loads(line)
        for line in write_rows(tmp_path / "data", 20).read_text().splitlines()
    ]
    assert len(rows) == 20 + 2 * (6 + 1 + 2 + 2 + 1)
    shown = {
        Image.open(tmp_path / "data" / name).convert("RGB").tobytes()
        for row in rows
        for name in row["images"]
    }
    # An example may show a picture that another one does.
    assert 0 < len(shown) - 20 - 2 * (6 + 1 + 2 * 2 + 2) <= 2 * 5
    cases = list(arrow_cases(20))
    assert not shown & {case.pictures[0].tobytes() for case in cases}
    texts = ["".join(m["content"] for m in row["messages"]).lower() for row in rows]
    assert sum(ARROW in text for text in texts) == 20
    # Of a new word's examples the names are given, and nothing is learned of them.
    learned = [
        sum(m["role"] == "assistant" and m.get("weight", 1) for m in row["messages"])
        for row in rows
    ]
    assert 1 in learned
    assert max(learned) == 4
    shots = max(rows, key=lambda row: len(row["messages"]))["messages"]
    assert len(shots) in (10, 18)
    assert {m["weight"] for m in shots[:-2] if m["role"] == "assistant"} == {0}


def verdict_of(**changes):
    def at(value):
        return {"accuracy": value}

    result = {
        "before": {"arrows": at(0.3), "old tasks": at(0.9)},
        "lora": {"arrows": at(0.96), "old tasks": at(0.885), "seconds": 500},
        "qlora": {"arrows": at(0.95), "seconds": 400},
        "fused": {"other_answers": 0},
    }
    for name, change in changes.items():
        result[name] = result[name] | change
    return [number for number, held in enumerate(verdict(result).values()) if not held]


def test_every_bar_can_be_missed():
    assert verdict_of() == []
    assert verdict_of(before={"arrows": {"accuracy": 0.97}}) == [0]
    assert verdict_of(lora={"arrows": {"accuracy": 0.94}}) == [1]
    assert verdict_of(qlora={"seconds": 601}) == [2]
    assert verdict_of(lora={"old tasks": {"accuracy": 0.87}}) == [3]
    assert verdict_of(qlora={"arrows": {"accuracy": 0.93}}) == [4]
    assert verdict_of(fused={"other_answers": 1}) == [5]


def test_the_kind_that_lost_the_most_is_named():
    before = {"read": {"accuracy": 0.9}, "count": {"accuracy": 0.97}}
    after = {"read": {"accuracy": 0.91}, "count": {"accuracy": 0.94}}
    assert lost_most(before, after) == {"kind": "count", "lost": 0.03}
