"""``mm1 eval``: figures on stdout, all else on stderr, errors in one line."""

import io
import json
import sys
from pathlib import Path

import pytest

from mm1_mlx.apps.cli import main
from mm1_mlx.eval.metrics import METRICS
from mm1_mlx.eval.tasks import TASKS
from mm1_mlx.quantize.shapes import case

COUNT = 3


@pytest.fixture
def mm1(monkeypatch, capfd):
    """Run the command; exit status, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mm1", "eval", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file whose rows have all that any task needs."""
    folder: Path = tmp_path_factory.mktemp("data")
    rows = []
    for seed in range(COUNT):
        shown = case(seed)
        shown.picture.save(folder / f"{seed}.png")
        rows.append({"image": f"{seed}.png", "question": shown.question,
                     "answer": shown.answer, "box": [8, 8, 40, 40]})  # fmt: skip
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def variant(data, metric):
    """The rows as a metric needs them."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        match metric:
            case "yes-no":
                row["answer"] = "yes"
            case "letter" | "likelihood":
                row |= {"choices": ["red", "blue", "green"], "answer": 0}
            case "blank":
                row |= {
                    "choices": ["star", "heart"],
                    "answer": 1,
                    "question": "A _ is red.",
                }
            case "caption":
                row["captions"] = [row.pop("answer"), "a red star"]
    path = data.with_name(f"{metric}.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("metric", METRICS)
def test_every_kind_of_task_runs_from_the_command_line(mm1, data, metric):
    name = next(task.name for task in TASKS.values() if task.metric == metric)
    code, out, err = mm1(name, variant(data, metric), "--json")
    assert code == 0
    # Choices are none of the embedded model's tasks: it describes the picture at length.
    assert not err or (metric == "letter" and "had not ended after" in err)
    results = json.loads(out)
    assert results["task"] == name
    assert results["n"] == COUNT
    guessed = {k for k, x in results["figures"].items() if x["chance"] is not None}
    # As the help says: the accuracy of choices, and of yes or no.
    named = {"letter": {"accuracy"}, "yes-no": {"accuracy"}, "blank": {"acc"}}
    assert guessed == (named | {"likelihood": {"acc", "acc_norm"}}).get(metric, set())
    for figure in results["figures"].values():
        if figure["low"] is not None:
            assert figure["low"] - 1e-9 <= figure["value"] <= figure["high"] + 1e-9
    assert results["figures"].popitem()[1]["n"] == COUNT


def test_figures_are_a_table(mm1, data, tmp_path):
    code, out, err = mm1("vqa", data, "--prompt", "{question}", "--out", tmp_path / "a")
    assert (code, err) == (0, "")
    head, row = out.splitlines()
    assert head.split() == ["task", "pictures", "figure", "95%", "chance", "n"]
    assert row.split()[:3] == ["vqa", "96", "accuracy"]
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    value = results["figures"]["accuracy"]["value"]
    assert row.split()[3] == f"{100 * value:.1f}"
    other = ("--resolution", "2x96", "--out", tmp_path / "b", "--limit", "1")
    assert mm1("vqa", data, *other)[0] == 0
    code, out, _ = mm1("--compare", tmp_path / "a", "--compare", tmp_path / "b")
    assert code == 0
    # By what two runs of the same model differ.
    rows = [line.split() for line in out.splitlines()[1:]]
    assert [row[:3] for row in rows] == [
        [str(tmp_path / "a"), "96", "accuracy"],
        [str(tmp_path / "b"), "2x96", "accuracy"],
    ]


def test_answers_that_had_no_room_are_told(mm1, data):
    code, _, err = mm1("exact", data, "--max-tokens", "1", "--style", "chat")
    assert code == 0
    assert err == (
        f"{COUNT} of {COUNT} answers had not ended after 1 tokens; --max-tokens lets "
        "them be longer\n"
    )


def test_the_tasks_are_listed(mm1):
    code, out, _ = mm1("--list")
    assert code == 0
    assert all(name in out for name in TASKS)
    assert [task["name"] for task in json.loads(mm1("--list", "--json")[1])] == [*TASKS]


def test_what_a_user_gets_wrong_is_one_line(mm1, data, tmp_path):
    for arguments, code, said in (
        (("nonsense", data), 2, "is no task"),
        ((), 2, "name a task and its data"),
        (("vqa", data, "--shots", "2"), 1, "give both"),
        (("vqa", tmp_path / "none.jsonl"), 1, "does not exist"),
        (("lambada", data.with_name("0.png")), 1, "which are read"),
        (("mmbench", data), 1, "rows.jsonl:1: the row has no choices"),
        (("--compare", tmp_path), 1, "results.json does not exist"),
        (("vqa", data, "--compare", tmp_path), 2, "leave task and data out"),
        (("vqa", "--list"), 2, "leave task and data out"),
        (("vqa", data, "--prompt", "{asked}"), 2, "the prompt has {asked}"),
        (("mmbench", data, "--prompt", "Choose {question}"), 2, "no {options}"),
    ):
        ended, out, err = mm1(*arguments)
        assert (ended, out) == (code, "")
        assert said in err.replace("\n", " ")
        if code == 1:
            assert err.startswith("error: ")
            assert len(err.splitlines()) == 1


SOUND = {
    "task": "vqa",
    "figures": {"accuracy": {"value": 0.5, "low": None, "high": None, "n": 2}},
    "categories": {},
}


def test_results_that_are_none_are_told_in_a_line(mm1, tmp_path):
    def compared(results):
        (tmp_path / "results.json").write_text(json.dumps(results))
        return mm1("--compare", tmp_path)

    assert compared(SOUND)[0] == 0
    figure = SOUND["figures"]["accuracy"]
    for wrong in (
        [],
        {key: SOUND[key] for key in ("task", "figures")},
        SOUND | {"figures": {"accuracy": figure | {"value": "0.5"}}},
        SOUND | {"figures": {"accuracy": figure | {"more": 1}}},
        SOUND | {"figures": {"accuracy": figure | {"n": None}}},
        SOUND | {"figures": []},
        SOUND | {"categories": [3]},
        SOUND | {"task": 3},
    ):
        code, out, err = compared(wrong)
        assert (code, out) == (1, "")
        assert err.endswith("holds no results of mm1 eval\n")
    hostile = {"\x1b]0;x\x07": SOUND["figures"]}
    code, out, _ = compared(SOUND | {"categories": hostile})
    assert code == 0
    assert "\x1b" not in out


def test_questions_without_a_picture_are_told(mm1, data):
    row = json.loads(data.read_text().splitlines()[0])
    path = data.with_name("blind.jsonl")
    path.write_text(json.dumps({"question": row["question"], "answer": "red"}) + "\n")
    code, _, err = mm1("exact", path, "--json")
    assert (code, err) == (0, "1 of 1 questions have no picture\n")
    assert mm1("vqa", path, "--json")[0] == 1


def test_pictures_may_lie_elsewhere_where_that_is_asked(mm1, data):
    folder = data.parent / "inner"
    folder.mkdir()
    row = json.loads(data.read_text().splitlines()[0])
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row | {"image": "../0.png"}) + "\n")
    code, _, err = mm1("vqa", path)
    assert code == 1
    assert "--outside" in err
    assert mm1("vqa", path, "--outside", "--json")[0] == 0


def test_skipped_rows_are_named_on_stderr(mm1, data):
    path = data.with_name("some.jsonl")
    path.write_text(data.read_text() + "nonsense\n")
    code, out, err = mm1("vqa", path, "--skip-bad", "--json")
    assert code == 0
    assert json.loads(out)["skipped"] == 1
    assert err.startswith(f"skipped: {path}:4: expected a JSON object")
