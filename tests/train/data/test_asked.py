"""Rows with a question: trained on and evaluated in the same words, about the same pictures."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mm1_mlx.errors import DataError
from mm1_mlx.eval.case import read_case
from mm1_mlx.eval.prompts import Asker
from mm1_mlx.eval.tasks import TASKS
from mm1_mlx.messages import collect
from mm1_mlx.train.data.example import Record
from mm1_mlx.train.data.forms import read_example, recognise
from mm1_mlx.train.data.pictures import PictureFolder
from mm1_mlx.train.paper import LETTER, SHORT_ANSWER

FOLDER = PictureFolder(Path("/data"))
NEEDS = frozenset({"question", "answers"})

ROWS = {
    "one picture": {"image": "a.png", "question": "What?"},
    "its bytes": {"image": {"bytes": b"one", "path": "x"}, "question": "What?"},
    "by its file's name": {"file_name": "a.png", "question": "What?"},
    "image and file": {"file_name": "b.png", "image": "a.png", "question": "What?"},
    "two pictures": {"images": ["a.png", "b.png"], "question": "Which is red?"},
    "none": {"question": "What?", "image": None, "images": [], "video": ""},
    "many answers": {"image": "a.png", "question": "What?", "answers": ["a", "b", "b"]},
    "a number": {"question": "How many?", "answer": 3},
    "a long one": {"question": "How many?", "answer": 10**400},
    "ChartQA": {"image": "a.png", "query": "What?", "label": ["14"]},
    "AI2D": {"image": "a.png", "question": "What?", "options": ["x", "y"], "answer": "1"},
    "A-OKVQA": {"image": "a.png", "question": "?", "choices": ["x", "y"], "answer": "y"},
    "ScienceQA": {"question": "?", "choices": ["x", "y"], "answer": 1, "hint": "So. "},
    "a hint": {"image": "a.png", "question": "Why?", "hint": "It purrs.\n"},
    "a hint with a place": {"image": "a.png", "question": "Why?", "hint": "<image>\nSo."},
    "a place before": {"image": "a.png", "question": "<image>\nWhat colour?"},
    "a place behind": {"image": "a.png", "question": "What colour?\n<image>"},
    "a place within": {"image": "a.png", "question": "What is <image> for?"},
    "two places": {"images": ["a.png", "b.png"], "question": "Is <image>\nlike <image>"},
    "a place alone": {"image": "a.png", "question": "<image>"},
    "a place in a query": {"image": "a.png", "query": "<image>What?", "label": ["1"]},
    "a place behind a hint": {
        "image": "a.png", "question": "<image>\nWhat?", "choices": ["x", "y"],
        "answer": 0, "hint": "It purrs.",
    },
    "a place in a hint": {
        "image": "a.png", "question": "What?", "choices": ["x", "y"], "answer": 0,
        "hint": "See <image>",
    },
    "a place before options": {
        "image": "a.png", "question": "What?\n<image>", "choices": ["x", "y"], "answer": 0,
    },
    "places to choose from": {
        "images": ["a.png", "b.png"], "question": "Which is red?", "answer": 1,
        "choices": ["<image>", "<image>"],
    },
}  # fmt: skip
REFUSED = {
    "too few pictures": {"image": "a.png", "question": "<image> or <image>?"},
    "too many": {"images": ["a.png", "b.png"], "question": "<image>What?"},
    "a place without a picture": {"question": "<image>\nWhat?"},
    "too few to choose from": {
        "image": "a.png", "question": "<image>\nWhich?", "choices": ["<image>", "x"],
        "answer": "x",
    },
    "image and images": {"image": "a.png", "images": ["b.png"], "question": "What?"},
    "a picture outside": {"file_name": "../a.png", "question": "What?"},
    "a picture that is none": {"image": 3, "question": "What?"},
    "a film": {"video": "a.mp4", "question": "What?"},
    "a film beside a picture": {"videos": ["a"], "image": "a.png", "question": "What?"},
    "a sound": {"audio": {"bytes": b"x"}, "question": "What is said?"},
    "options in columns": {"question": "What?", "A": "x", "B": "y"},
    "options as text": {"question": "What?", "options": "['x', 'y']"},
    "no text": {"image": "a.png", "question": 3},
    "no number": {"question": "How many?", "answer": json.loads("NaN")},
    "a number without end": {"question": "How many?", "answers": [json.loads("1e999")]},
}  # fmt: skip
ANSWERED = ("answer", "answers", "label")


def record_of(row):
    row = row if any(key in row for key in ANSWERED) else row | {"answer": "so"}
    assert recognise({k: x for k, x in row.items() if x is not None}) == "question"
    return Record(row, "rows.jsonl:17", FOLDER.path)


@pytest.mark.parametrize("prompt", [None, SHORT_ANSWER])
@pytest.mark.parametrize("name", ROWS)
def test_a_question_is_asked_as_it_is_learned(name, prompt):
    record = record_of(ROWS[name])
    example = read_example(record, FOLDER, prompt=prompt)
    case = read_case(record, FOLDER, NEEDS)
    task = TASKS["letter" if case.choices else "exact"]
    if prompt is not None:
        own = task.prompt.removesuffix(f"\n{LETTER}")
        task = replace(task, prompt=f"{own}\n{prompt}")
    asked = Asker(task, base=False).ask(case)
    turns, images = collect(asked.prompt, asked.images)
    assert (tuple(turns), tuple(images)) == (example.turns[:-1], example.images)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_learned_is_not_asked(name):
    said = []
    for read in (read_example, lambda *row: read_case(*row, NEEDS)):
        with pytest.raises(DataError, match=r"^rows.jsonl:17: ") as caught:
            read(record_of(REFUSED[name]), FOLDER)
        said.append(str(caught.value).partition(", or ")[0])
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("task", "base", "shown"),
    [
        ("vqa", True, "<i> Question: What is  for? Short answer:"),
        ("vqav2", False, f"What is <i> for?\n{SHORT_ANSWER}"),
        ("coco-caption", False, f"<i>{TASKS['coco-caption'].prompt}"),
        ("refcoco", False, "Where is What is <i> for?? Answer with its bounding box."),
    ],
)
def test_other_words_stand_around_a_question_with_a_place(task, base, shown):
    record = record_of(ROWS["a place within"])
    asked = Asker(TASKS[task], base).ask(read_case(record, FOLDER, NEEDS))
    ((_, parts),), images = collect(asked.prompt, asked.images)
    assert "".join("<i>" if part is None else part for part in parts) == shown
    assert images == [FOLDER.path / "a.png"]


def test_a_leading_place_stands_before_the_tasks_words():
    record = record_of({"image": "a.png", "question": "<image>\nthe red star"})
    asked = Asker(TASKS["refcoco"], base=False).ask(read_case(record, FOLDER, NEEDS))
    ((_, parts),), _ = collect(asked.prompt, asked.images)
    assert parts == [None, "Where is the red star? Answer with its bounding box."]
