"""The manual's lines of jq on rows as published data sets have them."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from mm1_mlx.eval.case import read_case
from mm1_mlx.eval.metrics import METRICS
from mm1_mlx.eval.tasks import TASKS
from mm1_mlx.train.data.example import Record
from mm1_mlx.train.data.pictures import PictureFolder

README = Path(__file__).parents[2] / "mm1_mlx/eval/README.md"
LINES = dict(
    re.findall(r"^\| ([^|]+) \| `(-n .*|'.*)` \|$", README.read_text(), re.MULTILINE)
)
VQA = {
    "questions.json": {"questions": [
        {"image_id": 42, "question_id": 420, "question": "What?"}]},
    "annotations.json": {"annotations": [
        {"image_id": 42, "question_id": 420, "answers": [{"answer": "red"}] * 10}]},
}  # fmt: skip
COCO = {
    "captions.json": {
        "images": [{"id": 7, "file_name": "7.jpg"}],
        "annotations": [{"image_id": 7, "caption": "a"}, {"image_id": 7, "caption": "b"}],
    }
}  # fmt: skip
# Of each task a row, and what it becomes.
ROWS = {
    "vqav2": (VQA, {"images": "COCO_val2014_000000000042.jpg", "question": "What?",
                    "answers": ("red",) * 10}),
    "coco-caption": (COCO, {"images": "7.jpg", "answers": ("a", "b")}),
    "pope": ({"image": "a.png", "text": "Is there?", "label": "yes"},
             {"question": "Is there?", "answers": ("yes",)}),
    "refcoco": ({"image": "a.png", "question": "Please", "answer": ["the star"],
                 "bbox": [10.0, 20.0, 5.0, 6.0]},
                {"question": "the star", "box": (10.0, 20.0, 15.0, 26.0)}),
    "arc-easy": ({"question": "What?", "choices": {"text": ["x", "y"], "label": ["1", "2"]},
                  "answerKey": "1"}, {"answers": ("x",)}),
    "piqa": ({"goal": "Go", "sol1": "x", "sol2": "y", "label": 1},
             {"question": "Go", "answers": ("y",)}),
    "sciq": ({"question": "What?", "support": "So.", "distractor1": "x",
              "distractor2": "y", "distractor3": "z", "correct_answer": "w"},
             {"hint": "So.", "answers": ("w",)}),
    "hellaswag": ({"activity_label": "Baking", "ctx_a": "A [header] cake  is [title] here.",
                   "ctx_b": "the Man", "endings": ["eats [step] it.", "y"], "label": "0"},
                  {"question": "Baking: A cake is. here. The man",
                   "choices": ("eats it.", "y"), "right": 0}),
    "winogrande": ({"sentence": "The _ is.", "option1": "x", "option2": "y", "answer": "2"},
                   {"question": "The _ is.", "right": 1}),
    "triviaqa": ({"question": "What", "answer": {"value": "x", "aliases": ["x", "z"]}},
                 {"answers": ("x", "z")}),
}  # fmt: skip


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
@pytest.mark.parametrize("task", ROWS)
def test_readmes_lines_make_rows_of_what_is_published(task, tmp_path):
    given, expected = ROWS[task]
    (line,) = [line for names, line in LINES.items() if task in names.split(", ")]
    rows = json.dumps(given)
    if task in ("vqav2", "coco-caption"):
        for name, content in given.items():
            (tmp_path / name).write_text(json.dumps(content))
        rows = ""
    arguments = shlex.split(line.replace(r"\|", "|"))
    made = subprocess.run(
        ["jq", "-c", *arguments], input=rows, cwd=tmp_path, capture_output=True,
        text=True, check=True,
    ).stdout  # fmt: skip
    values = json.loads(made)
    needs = METRICS[TASKS[task].metric].needs
    record = Record(values, "rows.jsonl:1", tmp_path)
    case = read_case(record, PictureFolder(tmp_path), needs)
    assert METRICS[TASKS[task].metric].wrong(case) == ""
    for key, value in expected.items():
        found = case.images[0].name if key == "images" else getattr(case, key)
        assert found == value


def test_every_line_is_tried():
    named = {name for names in LINES for name in names.split(", ")}
    assert set(ROWS) <= named
    assert len(LINES) == len(ROWS)
