"""The task that the embedded model cannot do: its answers, and the rows that teach it."""

import json
import re
from collections import Counter

import pytest
from PIL import Image

from benchmarks.shapes import fine_tune
from benchmarks.shapes.arrows import ARROW, arrow_cases, arrow_questions, arrow_scene
from benchmarks.shapes.cases import facts, part_cases
from benchmarks.shapes.fine_tune import figures_of, lost_most, verdict, write_rows
from benchmarks.shapes.questions import caption
from benchmarks.shapes.scene import COLOURS, SHAPES, split_rng
from mm1_mlx.runtime import TINY


def test_nothing_else_knows_of_arrows():
    assert ARROW not in SHAPES
    # A caption that names it is judged by what is there.
    assert facts("A red arrow and two blue arrows.") == {
        ("red", ARROW): 1,
        ("blue", ARROW): 2,
    }


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
        for line in write_rows(tmp_path / "data", 100).read_text().splitlines()
    ]
    known = dict(fine_tune.REHEARSED)
    assert len(rows) == 100 + sum(known.values())
    shown = {
        Image.open(tmp_path / "data" / name).convert("RGB").tobytes()
        for row in rows
        for name in row["images"]
    }
    # An example may show a picture that another one does.
    assert known.pop("words") == 2
    alone = 100 + sum(known.values()) + known["pairs"]
    assert 0 < len(shown) - alone <= 5 + 9
    cases = list(arrow_cases(40))
    assert not shown & {case.pictures[0].tobytes() for case in cases}
    texts = ["".join(m["content"] for m in row["messages"]).lower() for row in rows]
    assert sum(ARROW in text for text in texts) == 100
    # Of a new word's examples the names are given, and nothing is learned of them.
    learned = [
        sum(m["role"] == "assistant" and m.get("weight", 1) for m in row["messages"])
        for row in rows
    ]
    assert 1 in learned
    assert max(learned) == 4
    # Behind four examples, and behind eight.
    shots = [m for m in (row["messages"] for row in rows) if len(m) > 8]
    assert sorted(map(len, shots)) == [10, 18]
    for some in shots:
        assert {m["weight"] for m in some[:-2] if m["role"] == "assistant"} == {0}


def test_what_is_hard_is_asked_first_and_captions_first_or_last(tmp_path):
    first, arrows, hard, captions = Counter(), Counter(), Counter(), 0
    rows = write_rows(tmp_path / "data", 200).read_text().splitlines()
    for row in map(json.loads, rows):
        asked, name = row["messages"], row["images"][0]
        turns = [turn["content"].removeprefix("<image>\n") for turn in asked]
        told = [i // 2 for i in range(1, len(turns), 2) if facts(turns[i])]
        if re.match(r"arrow\d", name):
            first[bool(re.match("How many arrows|Count the arrows", turns[0]))] += 1
            counts = [
                turns[i + 1] for i in range(0, len(turns), 2) if "many" in turns[i]
            ]
            arrows.update(counts)
            captions += bool(told)
            assert set(told) <= {0, len(turns) // 2 - 1}
        elif re.match(r"scenes\d", name) and told != [0]:
            assert not told
            hard[bool(re.fullmatch(r"yes|no|\d", turns[1]))] += 1
    assert first[True] > 60
    assert hard[True] > 9 * hard[False]
    assert captions > 60
    assert arrows["3"]
    cases = Counter(c.expected for c in arrow_cases(100) if c.kind == "arrows, count")
    assert cases.keys() == set("012")


def verdict_of(**changes):
    def at(value):
        return {"accuracy": value}

    result = {
        "before": {"arrows": at(0.3), "old tasks": at(0.9)},
        "seconds": {"lora": 500, "qlora": 400},
        "lora": {"arrows": at(0.96), "old tasks": at(0.885)},
        "qlora": {"arrows": at(0.95), "old tasks": at(0.87)},
        "fused": {"others": {"float32": 0, "float16": 3}},
    }
    for name, change in changes.items():
        result[name] = result[name] | change
    return [number for number, held in enumerate(verdict(result).values()) if not held]


def test_every_process_has_a_micro_batch():
    assert fine_tune.FLAGS["micro-batches"] % fine_tune.PROCESSES == 0


def test_every_bar_can_be_missed():
    assert verdict_of() == []
    assert verdict_of(before={"arrows": {"accuracy": 0.97}}) == [0]
    assert verdict_of(lora={"arrows": {"accuracy": 0.94}}) == [1]
    assert verdict_of(seconds={"qlora": 601}) == [2]
    assert verdict_of(lora={"old tasks": {"accuracy": 0.87}}) == [3]
    assert verdict_of(qlora={"arrows": {"accuracy": 0.93}}) == [4]
    assert verdict_of(qlora={"old tasks": {"accuracy": 0.86}}) == [4]
    assert verdict_of(fused={"others": {"float32": 1}}) == [5]


def row(right, low=None, chance=0.5, n=200):
    low = right - 0.02 if low is None else low
    return {
        "n": n,
        "accuracy": right,
        "interval_95": [low, right + 0.02],
        "chance_uniform": chance / 2,
        "chance_majority": chance,
    }


BEFORE = {
    "read": row(0.9),
    "count": row(0.97),
    # Of others a part.
    "count to 4": row(0.97),
    "new word, 4 shots": row(0.53, low=0.49),
}


def test_the_kind_that_lost_the_most_is_named():
    after = BEFORE | {"read": row(0.91), "count": row(0.94)}
    # What was told as if by chance cannot be lost.
    after |= {"new word, 4 shots": row(0.4), "count to 4": row(0.9)}
    assert lost_most(BEFORE, after) == {"kind": "count", "lost": 0.03}
    figures = figures_of({"arrows, colour": row(0.5)}, after, BEFORE)
    assert figures["old tasks"]["n"] == 400
    assert figures["old tasks"]["accuracy"] == 0.925
    assert figures["arrows"]["accuracy"] == 0.5


@pytest.fixture
def stubs(monkeypatch):
    """What takes long is noted and made up."""
    done = []

    def mm1(word, _, out, *_others):
        done.append(word)
        out.mkdir(parents=True)
        if word == "quantize":
            (out / "model.safetensors").write_bytes(b"packed")

    def train(base, data, run):
        assert data.read_text()
        done.append(run.name)
        mm1("train", base, run)
        return 100.0

    def new_figures(model, adapter, number):
        right = 0.97 if adapter or model.name.startswith("fused") else 0.3
        return {"arrows, colour": row(right, n=number)}, ["red"] * number

    monkeypatch.setattr(fine_tune, "mm1", mm1)
    monkeypatch.setattr(fine_tune, "train", train)
    monkeypatch.setattr(fine_tune, "PICTURES", 40)
    monkeypatch.setattr(fine_tune, "new_figures", new_figures)
    monkeypatch.setattr(fine_tune, "old_figures", lambda *_: (BEFORE, ["blue"] * 50))
    return done


def test_nothing_is_reported_of_the_cases_that_the_share_was_chosen_on(monkeypatch):
    def shown(cases):
        return {(c.kind, c.question, c.mode, c.pictures[0].tobytes()) for c in cases}

    monkeypatch.setattr(fine_tune, "CHOSEN_ON", 2)
    new = shown(fine_tune.asked_of(fine_tune.NEW, 3))
    assert new == shown(arrow_cases(10)) - shown(arrow_cases(4))
    for part in ("scenes", "pairs", "small"):
        old = list(fine_tune.asked_of(part, 3))
        assert set(Counter(case.kind for case in old).values()) == {3}
        assert shown(old) == shown(part_cases(part, 5)) - shown(part_cases(part, 2))
    # So few that none is passed over; nothing was chosen on them.
    few = list(fine_tune.asked_of(fine_tune.FEW, 3))
    assert shown(few) == shown(part_cases(fine_tune.FEW, 3))


def test_parts_are_asked_side_by_side_and_told_in_order(monkeypatch):
    monkeypatch.setattr(fine_tune, "PARTS", ("pairs", "reading"))
    rows, words = fine_tune.old_figures(TINY, None, 3)
    assert list(rows) == ["two pictures", "read"]
    assert [row["n"] for row in rows.values()] == [3, 3]
    cases = [case for part in fine_tune.PARTS for case in fine_tune.asked_of(part, 3)]
    right = [case.is_right(said) for case, said in zip(cases, words, strict=True)]
    assert [row["accuracy"] for row in rows.values()] == [
        pytest.approx(sum(some) / 3, abs=1e-4) for some in (right[:3], right[3:])
    ]


def test_a_run_goes_on_with_what_is_lacking(stubs, tmp_path, monkeypatch):
    def run():
        monkeypatch.setattr("sys.argv", ["fine_tune", str(tmp_path), "-n", "100"])
        with pytest.raises(SystemExit) as ended:
            fine_tune.main()
        return ended.value.code

    assert run() == 0
    assert stubs == [*("quantize", "lora", "train", "fuse", "fuse", "qlora", "train")]
    path = tmp_path / "result.json"
    whole = json.loads(path.read_text())
    size = (TINY / "model.safetensors").stat().st_size
    assert whole["bytes"] == {"model": size, "4-bit copy": 6}
    assert whole["fused"] == {
        "answers": 150,
        "others": {"float32": 0, "float16": 0},
    }
    assert all(whole["verdict"].values())
    shown = fine_tune.table(whole).splitlines()
    assert shown[0] == "| | before | LoRA | QLoRA |"
    arrows = "| arrows, 100 questions | 30.0% (21.9% to 39.6%) | 97.0% "
    assert shown[2].startswith(arrows)
    assert shown[3].startswith("| old tasks, 400 | 93.5% (")
    assert shown[4:] == [
        "| the old task that lost the most |  | read: 0.0 points | read: 0.0 points |",
        "| training, seconds |  | 100 | 100 |",
        "| other answers fused in float32, of 150 |  | 0 |  |",
        "| other answers fused in float16, of 150 |  | 0 |  |",
    ]
    # Stopped while QLoRA was asked, and while it was trained: its seconds count, so it
    # begins anew.
    begun = {k: v for k, v in whole.items() if k not in ("qlora", "verdict")}
    for seconds, trained in ((whole["seconds"], []), ({"lora": 100.0}, ["qlora"])):
        del stubs[:]
        path.write_text(json.dumps(begun | {"seconds": seconds}))
        assert run() == 0
        assert stubs == [*trained, *["train"] * len(trained)]
        assert json.loads(path.read_text()) == whole
    # Arrows that are not learned well enough.
    whole["lora"]["arrows"]["accuracy"] = 0.5
    path.write_text(json.dumps(whole))
    assert run() == 1
    # Another number of cases, or another model, would be another result.
    path.write_text(json.dumps(whole | {"model": "other"}))
    assert "other settings" in run()
