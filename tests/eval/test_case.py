"""Rows of data files as questions; what is none is told in one line with its place."""

import json
import random
from pathlib import Path

import pytest

from mm1_mlx.errors import DataError
from mm1_mlx.eval.case import read_case
from mm1_mlx.eval.metrics import METRICS
from mm1_mlx.runtime import TINY
from mm1_mlx.train.data.example import Record
from mm1_mlx.train.data.pictures import PictureFolder

NEEDS = METRICS["vqa"].needs


def case_of(values, needs=frozenset(), folder=TINY, *, passage=False):
    record = Record(values, "rows.jsonl:17", Path(folder))
    pictures = PictureFolder(Path(folder))
    return read_case(record, pictures, frozenset(needs), passage=passage)


@pytest.mark.parametrize(
    ("values", "answers"),
    [
        ({"answer": "red"}, ("red",)),
        ({"answer": 14}, ("14",)),
        ({"answers": ["a", "b"]}, ("a", "b")),
        ({"answers": [{"answer": "a", "answer_id": 1}, {"answer": "b"}]}, ("a", "b")),
        ({"captions": ["a star", "a red star"]}, ("a star", "a red star")),
        ({"caption": "a star"}, ("a star",)),
        ({"choices": ["x", "y"], "answer": 1}, ("y",)),
        ({"choices": ["x", "y"], "answer": "A"}, ("x",)),
        ({"choices": ["x", "y"], "answer": "y"}, ("y",)),
        ({"choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answer": "2"}, ("y",)),
    ],
)  # fmt: skip
def test_answers_are_found_where_data_sets_have_them(values, answers):
    assert case_of({"question": "?", **values}, {"answers"}).answers == answers


@pytest.mark.parametrize(
    ("values", "answers", "right"),
    [
        ({"query": "How many?", "label": ["3"], "human_or_machine": 0}, ("3",), None),
        ({"question": "Which?", "options": ["x", "y"], "answer": "1"}, ("y",), 1),
        ({"question": "Which?", "options": ["x", "y"], "answer": "A"}, ("x",), 0),
        ({"question": "Which?", "options": ["1", "2"], "answer": "0"}, ("1",), 0),
        ({"question": "Which?", "options": ["0", "1"], "answer": "1"}, ("1",), 1),
        # Ours come first.
        (
            {"question": "Is?", "query": "x", "answer": "no", "label": "yes"},
            ("no",),
            None,
        ),
    ],
)
def test_hugging_faces_own_keys_are_read(values, answers, right):
    case = case_of(values, {"question", "answers"})
    assert (case.answers, case.right) == (answers, right)
    assert case.question == values.get("question", "How many?")


ASKED = {"role": "user", "content": "<image>\nWhose is it?"}
SAID = {"role": "assistant", "content": "Ada's."}
MORE = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [ASKED, SAID], "images": ["red-star.png"]},
        {"conversations": [{"from": "human", "value": "<image>\nWhose is it?"},
                           {"from": "gpt", "value": "Ada's."}], "image": "red-star.png"},
        {"texts": [{"user": "Whose is it?", "assistant": "Ada's."}],
         "images": ["red-star.png"]},
        {"prompt": "Whose is it?", "completion": "Ada's.", "image": "red-star.png"},
        # Named in its part, an answer that is only read, and a question left open.
        {"messages": [{"role": "user", "content": [
            {"type": "image", "image": "red-star.png"},
            {"type": "text", "text": "Whose is it?"}]}, SAID,
            MORE[0], MORE[1] | {"weight": 0}, MORE[0]]},
    ],
)  # fmt: skip
def test_rows_of_training_are_asked_as_they_are(values):
    case = case_of(values | {"hint": "Not learned."}, NEEDS)
    assert (case.question, case.hint) == ("Whose is it?", "")
    assert case.answers == ("Ada's.",)
    assert case.images == (TINY / "red-star.png",)
    assert case.turns == (("user", [None, "Whose is it?"]),)


def test_of_a_conversation_the_last_answer_is_asked():
    values = {"messages": [ASKED, SAID, *MORE], "image": "red-star.png"}
    case = case_of(values, NEEDS)
    assert (case.question, case.answers) == ("Sure?", ("Yes.",))
    turns = [("user", [None, "Whose is it?"]), ("assistant", ["Ada's."])]
    assert case.turns == (*turns, ("user", ["Sure?"]))
    # What was said before tells it from another; its own keys win.
    other = values["messages"][1] | {"content": "Bob's."}
    changed = values | {"messages": [ASKED, other, *MORE]}
    assert case_of(changed, NEEDS).digest() != case.digest()
    assert case_of(values | {"answers": ["a", "b"]}, NEEDS).answers == ("a", "b")
    own = case_of(values | {"question": "What?", "answer": "red"}, NEEDS)
    assert (own.question, own.answers, own.turns) == ("What?", ("red",), ())


def test_refcocos_rows_are_told_what_to_become():
    row = {"image": "red-star.png", "question": "?", "answer": ["a", "b"],
           "bbox": [1, 2, 3, 4]}  # fmt: skip
    with pytest.raises(DataError, match=r"17: it has bbox, .* the phrase as question"):
        case_of(row, METRICS["box"].needs)
    assert case_of(row | {"box": [1, 2, 4, 6]}, METRICS["box"].needs).box == (
        1,
        2,
        4,
        6,
    )


def test_a_passage_is_asked_for_its_last_word():
    for text in ("it was a star", "it was a star \n"):
        case = case_of({"text": text}, {"answers"}, passage=True)
        assert (case.question, case.answers) == ("it was a", ("star",))
    with pytest.raises(DataError, match="words of which the last is asked"):
        case_of({"text": "word"}, {"answers"}, passage=True)


def test_a_question_file_without_answers_is_no_passage():
    """Of LLaVA's and POPE's files ``text`` is the question."""
    for values in ({"text": "What is it?", "category": "x"},
                   {"text": "Is it red?", "label": "yes"}):  # fmt: skip
        with pytest.raises(DataError, match="the row has no answers"):
            case_of(values, {"answers"})


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        (["B", "A", "C"], "B"),
        ({"text": ["a star", "two"], "label": ["1", "2"]}, 1),
        (["x", "x"], "x"),
        ({"text": ["x", "y"], "label": ["1", "1"]}, "1"),
    ],
)
def test_an_answer_that_names_two_choices_is_refused(choices, answer):
    with pytest.raises(DataError, match="names 2 of the choices"):
        case_of({"question": "?", "choices": choices, "answer": answer})


def test_digits_of_a_row_from_ai2d_are_always_a_number():
    options = {"question": "?", "options": ["1", "2", "3", "4"]}
    assert case_of(options | {"answer": "1"}).answers == ("2",)
    assert case_of(options | {"answer": "0"}).answers == ("1",)


def test_a_label_that_a_row_gives_is_one_where_it_is_a_text_too():
    """As ARC has them."""
    choices = {"text": ["3", "4", "5", "6"], "label": ["1", "2", "3", "4"]}
    assert case_of({"question": "?", "choices": choices, "answer": "3"}).right == 2
    assert case_of({"question": "?", "choices": choices, "answer": "6"}).right == 3


def test_a_number_counts_numbers_to_choose_from():
    assert case_of({"choices": ["1", "2", "0"], "answer": 1}).right == 1
    assert case_of({"choices": ["B", "A"], "answer": 0}).right == 0
    # The letter and the text of the same choice.
    assert case_of({"choices": ["A", "B"], "answer": "B"}).right == 1


def test_a_case_is_known_by_what_it_holds(tmp_path):
    def of(**changes):
        return case_of({**SOUND, "image": "a.png", **changes}, folder=tmp_path).digest()

    (tmp_path / "a.png").write_bytes(b"one")
    once = of()
    assert of() == once
    assert of(answer="blue") != once
    assert of(box=[0, 0, 9, 8]) != once
    (tmp_path / "b.png").write_bytes(b"one")
    assert of(image="b.png") == once
    (tmp_path / "a.png").write_bytes(b"two")
    assert of() != once


def test_pictures_lie_in_the_folder():
    assert case_of({"image": "red-star.png"}).images == (TINY / "red-star.png",)
    assert len(case_of({"images": ["red-star.png", "four-shapes.png"]}).images) == 2
    with pytest.raises(
        DataError, match=r"^rows.jsonl:17: picture '../x.png' lies outs"
    ):
        case_of({"image": "../x.png"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the row has no answers, which the task needs; its keys are []"),
        ({"answer": "red"}, "the row has no question"),
        ({"question": "", "answer": "red"}, "the row has no question"),
        ({"question": 3, "answer": "red"}, "question is 3, expected text"),
        ({"question": "?", "answer": True}, "answer holds True, expected text"),
        ({"question": "?", "answers": [["a"]]}, "answers holds ['a'], expected text"),
        ({"question": "?", "answer": "a", "answers": ["a"]}, "both answer and answers"),
        ({"question": "\ud800", "answer": "a"}, "not valid Unicode"),
        ({"question": "?", "choices": ["x"], "answer": 0}, "choices has 1 texts"),
        ({"question": "?", "choices": ["x", " "], "answer": 0}, "holds an empty text"),
        ({"question": "?", "choices": "xy", "answer": 0}, "expected a list of texts"),
        ({"question": "?", "choices": ["x", "y"]}, "answer is None, expected the number"),
        ({"question": "?", "choices": ["x", "y"], "answer": 2}, "from 0 to 1"),
        ({"question": "?", "choices": ["x", "y"], "answer": "C"}, "from 0 to 1"),
        ({"answer": {"value": "a", "aliases": ["a"]}}, "holds {'value': 'a', 'aliases'"),
        ({"category": "\x1b[31mX"}, "expected a line without control codes"),
        ({"category": "a\nb"}, "expected a line without control codes"),
        ({"category": "a\u2028b"}, "expected a line without control codes"),
        ({"box": [10, 20, 5, 50]}, "not COCO's [x, y, width, height]"),
        ({"box": [0.1, 0.2, 0.5, 0.6]}, "shares of the picture; expected [left, top"),
        ({"image": "a.png", "images": ["b.png"]}, "both image and images"),
        ({"box": [1, 2, 3]}, "expected [left, top, right, bottom]"),
        ({"box": [5, 0, 1, 9]}, "expected [left, top, right, bottom]"),
        ({"box": [0, 0, float("inf"), 9]}, "expected [left, top, right, bottom]"),
        ({"messages": [SAID]}, "its last answer follows no turn of the user's"),
        ({"messages": [MORE[0]]}, "no assistant turn"),
        ({"texts": ["a", None], "images": [None, "red-star.png"]}, "asks nothing"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "region",
          "box": [1, 2, 3, 4]}]}, SAID], "image": "red-star.png"}, "refers to a region"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_row_is_said_in_a_line(values, message):
    with pytest.raises(DataError) as caught:
        case_of(values, NEEDS)
    assert str(caught.value).startswith("rows.jsonl:17: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


ODD = (
    None, True, 0, -1, 1e400, float("nan"), "", " ", "\x00", "a", [], {}, [None], ["a"],
    [[]], {"text": None}, {"text": ["a", "b"], "label": 3}, {"answer": None}, "\ud800",
    {"bytes": None}, "data:image/png;base64,AA", "http://x/y.png", [1, 2, 3, 4], "A" * 999,
)  # fmt: skip


SOUND = {
    "image": "red-star.png",
    "question": "What?",
    "answer": "red",
    "box": [0, 0, 9, 9],
}


def outcome(values, needs):
    """The case of a row, or what is wrong with it."""
    try:
        return case_of(values, needs)
    except DataError as error:
        return str(error)


def test_odd_rows_are_read_or_told_in_one_line_with_their_place():
    stream = random.Random(0)
    keys = [
        *SOUND,
        "images",
        "answers",
        "captions",
        "choices",
        "hint",
        "text",
        "category",
    ]
    read = told = 0
    for _ in range(4000):
        needs = stream.choice([*METRICS.values()]).needs
        odd = {
            key: stream.choice(ODD) for key in stream.sample(keys, stream.randint(1, 3))
        }
        found = outcome({**SOUND, **odd}, needs)
        if isinstance(found, str):
            told += 1
            assert found.startswith("rows.jsonl:17: ")
            assert "\n" not in found
        else:
            read += 1
            assert all(getattr(found, name) for name in needs)
    assert min(read, told) > 300


def test_yes_or_no_and_blanks_are_checked():
    yes = case_of({"question": "?", "answer": "Yes"})
    assert METRICS["yes-no"].wrong(yes) == ""
    maybe = case_of({"question": "?", "answer": "maybe"})
    assert "expected yes or no" in METRICS["yes-no"].wrong(maybe)
    people = [case_of({"question": "?", "answers": ["a"] * n}) for n in (1, 2, 9, 10)]
    wrong = [METRICS["vqa"].wrong(case) for case in people]
    assert (wrong[0], wrong[3]) == ("", "")
    assert wrong[1].startswith("it has 2 answers, expected one, or those of ten people")
    assert wrong[2].startswith("it has 9 answers")
    blank = json.loads('{"question": "no blank", "choices": ["x", "y"], "answer": 0}')
    assert "expected one '_'" in METRICS["blank"].wrong(case_of(blank))
