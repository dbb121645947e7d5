"""A task on drawn pictures: the figures are those of asking one by one."""

import errno
import json
import math
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mm1_mlx.adapters import Adapter, AdapterConfig, attach, base_of, save
from mm1_mlx.adapters.attach import wrapped
from mm1_mlx.batch import Ask
from mm1_mlx.checkpoint import load_model
from mm1_mlx.errors import CheckpointError, DataError
from mm1_mlx.eval.cider import cider
from mm1_mlx.eval.existence import says_yes
from mm1_mlx.eval.letters import find_option
from mm1_mlx.eval.log import Log
from mm1_mlx.eval.metrics import METRICS
from mm1_mlx.eval.prompts import Asker
from mm1_mlx.eval.recall import overlap
from mm1_mlx.eval.run import Options, _open, altered, evaluate
from mm1_mlx.eval.tasks import TASKS
from mm1_mlx.eval.vqa import vqa_accuracy
from mm1_mlx.grounding import parse_boxes
from mm1_mlx.hold import Hold
from mm1_mlx.likelihood import Candidates, loglikelihoods
from mm1_mlx.runtime import TINY, generate, load
from mm1_mlx.shots import Shot
from mm1_mlx.train.data.questions import list_options
from mm1_mlx.train.paper import CAPTION, LETTER, SHORT_ANSWER

from .conftest import write

PLAIN = TASKS["vqa"]
DATED = "{{ strftime_now('%d %b %Y') }}"


@pytest.fixture(scope="module")
def runtime():
    with load() as runtime:
        yield runtime


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def figures(runtime, task, path, **options):
    task = TASKS[task] if isinstance(task, str) else task
    results = evaluate(runtime, task, path, Options(**options))
    return {name: held["value"] for name, held in results["figures"].items()}


def say(runtime, folder, row, question, max_tokens=128, **options):
    image = [folder / row["image"]] if "image" in row else []
    answer = generate(runtime, question, image, max_tokens=max_tokens, **options)
    return answer.text.strip()


def mean(values):
    return pytest.approx(sum(values) / len(values))


def test_answers_are_counted_as_one_by_one(runtime, drawn):
    path = drawn / "ask.jsonl"
    scores = [
        vqa_accuracy(say(runtime, drawn, row, row["question"]), [row["answer"]])
        for row in rows_of(path)
    ]
    assert sum(scores) > 0
    assert figures(runtime, PLAIN, path) == {"accuracy": mean(scores)}


def test_a_run_goes_on_with_the_day_that_its_prompts_say(
    runtime, drawn, tmp_path, monkeypatch
):
    """Where the model's template writes one: else half would be asked otherwise."""

    def run():
        asked = Options(limit=2)
        results = evaluate(runtime, PLAIN, drawn / "ask.jsonl", asked, out=tmp_path)
        return results["settings"]

    assert "date" not in run()
    for name in ("run", "answers", "results"):
        next(tmp_path.glob(f"{name}.json*")).unlink()
    monkeypatch.setattr(runtime.tokenizer.hf._tokenizer, "chat_template", DATED)
    assert date.fromisoformat(run()["date"]) <= date.today()
    record = tmp_path / "run.json"
    settings = json.loads(record.read_text())
    record.write_text(json.dumps(settings | {"date": "2024-02-29"}))
    assert run()["date"] == "2024-02-29"
    assert runtime.tokenizer.today is None
    record.write_text(json.dumps(settings | {"date": "someday"}))
    with pytest.raises(DataError, match=r"another run, whose \['date'\] differ"):
        run()


def test_the_file_that_was_trained_on_is_asked_alike(runtime, drawn):
    """README's mine.jsonl: the same questions, in the forms that training reads."""
    plain = rows_of(drawn / "ask.jsonl")[:4]
    spoken = [
        {"messages": [{"role": "user", "content": f"<image>\n{row['question']}"},
                      {"role": "assistant", "content": row["answer"]}],
         "images": [row["image"]]} if i % 2 else row
        for i, row in enumerate(plain)
    ]  # fmt: skip
    path = write(drawn / "mine.jsonl", spoken)
    results = evaluate(runtime, TASKS["exact"], path, Options())
    assert (results["n"], results["skipped"], results["without_picture"]) == (4, 0, 0)
    expected = figures(runtime, "exact", drawn / "ask.jsonl", limit=4)
    assert results["figures"]["exact_match"]["value"] == expected["exact_match"] > 0


def test_captions_are_counted_over_all_pictures(runtime, drawn):
    path = drawn / "caption.jsonl"
    rows = rows_of(path)
    for task, asked in ((TASKS["coco-caption"], CAPTION),
                        (altered(TASKS["caption"], prompt="Describe the picture."),
                         "Describe the picture.")):  # fmt: skip
        said = [say(runtime, drawn, row, asked, task.max_tokens) for row in rows]
        scores = cider(said, [row["captions"] for row in rows])
        assert figures(runtime, task, path)["cider"] == mean(scores)
    assert sum(scores) > 0


def test_letters_are_found_in_answers(runtime, drawn):
    path, right = drawn / "letter.jsonl", []
    for row in rows_of(path):
        asked = f"{row['question']}\n{list_options(row['choices'])}\n{LETTER}"
        said = say(runtime, drawn, row, asked, 16)
        right.append(find_option(said, row["choices"]) == row["answer"])
    results = evaluate(runtime, TASKS["mmbench"], path, Options())
    assert results["figures"]["accuracy"]["value"] == mean(right)
    assert results["figures"]["accuracy"]["chance"] == 0.25


def test_pope_is_counted_by_what_is_said(runtime, drawn):
    path = drawn / "yes-no.jsonl"
    said = [
        says_yes(say(runtime, drawn, row, f"{row['question']}\n{SHORT_ANSWER}", 16))
        for row in rows_of(path)
    ]
    right = [row["answer"] == "yes" for row in rows_of(path)]
    found = figures(runtime, "pope", path)
    assert found["yes_ratio"] == mean(said)
    assert found["accuracy"] == mean([a == b for a, b in zip(said, right, strict=True)])


def test_boxes_are_those_in_the_answer(runtime, drawn):
    path, shares = drawn / "box.jsonl", []
    most = runtime.config.prompt.coordinate_range
    for row in rows_of(path):
        asked = f"Where is {row['question']}? Answer with its bounding box."
        boxes = parse_boxes(say(runtime, drawn, row, asked, 64), (96, 96), most)
        shares.append(overlap(boxes[0].box, row["box"]) if boxes else 0)
    found = figures(runtime, "refcoco", path)
    assert found == {
        "recall@0.5": mean([share > 0.5 for share in shares]),
        "overlap": mean(shares),
    }


def test_choices_are_taken_by_their_likelihood(runtime, drawn):
    path, raw, normed = drawn / "rank.jsonl", [], []
    for row in rows_of(path):
        texts = tuple(f" {text}" for text in row["choices"])
        ask = Ask(row["question"], [drawn / row["image"]])
        ((_, found),) = loglikelihoods(runtime, [Candidates(ask, texts)])
        scores = [x.logprob for x in found]
        norms = [x.logprob / len(t) for x, t in zip(found, row["choices"], strict=True)]
        raw.append(row["choices"][scores.index(max(scores))] == row["answer"])
        normed.append(row["choices"][norms.index(max(norms))] == row["answer"])
    found = figures(runtime, "likelihood", path)
    assert found == {"acc": mean(raw), "acc_norm": mean(normed)}
    assert found["acc"] > 0.25


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("arc-easy", {"acc", "acc_norm"}),
        ("winogrande", {"acc"}),
        ("lambada", {"acc", "perplexity"}),
        ("triviaqa", {"exact_match"}),
    ],
)
def test_text_is_asked_without_pictures(runtime, drawn, task, names):
    found = figures(runtime, task, drawn / f"{task}.jsonl")
    assert set(found) == names


def test_perplexity_is_of_the_last_word(runtime, drawn):
    asked = Candidates(Ask("The star is"), (" red",))
    ((_, (word,)),) = loglikelihoods(runtime, [asked])
    found = figures(runtime, "lambada", drawn / "lambada.jsonl")
    assert found == {
        "acc": word.greedy,
        "perplexity": pytest.approx(math.exp(-word.logprob)),
    }
    assert word.logprob < -0.01


OWN = [name for name, task in TASKS.items() if task.name == task.metric]


@pytest.mark.parametrize("name", OWN)
def test_questions_of_ones_own_are_asked_alone(name):
    """As they were trained on, and with room for sentences; published ones as published."""
    task = TASKS[name]
    if "question" in METRICS[task.metric].needs and name not in ("letter", "box"):
        assert task.prompt.removeprefix("{hint}") == task.plain.removeprefix("{hint}")
        assert task.prompt.endswith("{question}")
    if name not in ("box", "likelihood"):
        assert task.max_tokens >= 100


def test_published_tasks_ask_as_published():
    for name in ("vqav2", "textvqa", "gqa", "chartqa", "pope", "docvqa"):
        assert TASKS[name].prompt == "{question}\n" + SHORT_ANSWER
        assert TASKS[name].max_tokens == (64 if name == "docvqa" else 16)


def test_answers_that_had_no_room_are_counted(runtime, drawn, tmp_path):
    path, short = drawn / "caption.jsonl", altered(TASKS["caption"], max_tokens=2)
    found = evaluate(runtime, short, path, Options(limit=3), out=tmp_path)
    assert found["unended"] == found["n"] == 3
    assert all(row["unended"] for row in rows_of(tmp_path / "answers.jsonl"))
    # Kept, with the answers, by the run that goes on.
    assert evaluate(runtime, short, path, Options(limit=3), out=tmp_path) == found
    assert evaluate(runtime, TASKS["caption"], path, Options(limit=3))["unended"] == 0


def test_answers_of_a_model_with_adapters_are_its_own(runtime, drawn, tmp_path):
    """By the runtime, which says what it is; the same folder is not gone on with."""
    model = load_model(TINY, mx.float32)
    model.freeze()
    attach(model, config := AdapterConfig(rank=2))
    for layer in wrapped(model).values():
        layer.lora_b = mx.ones_like(layer.lora_b)
    save(tmp_path / "adapter", Adapter.of(model, config, base_of(TINY)))
    path, out, options = drawn / "ask.jsonl", tmp_path / "out", Options(limit=1)
    plain = evaluate(runtime, PLAIN, path, options, out=out)["settings"]["model"]
    assert plain["adapters"] == []
    with load(adapters=[(tmp_path / "adapter", 0.5)]) as adapted:
        with pytest.raises(DataError, match=r"another run, whose \['model'\] differ"):
            evaluate(adapted, PLAIN, path, options, out=out)
        found = evaluate(adapted, PLAIN, path, options)["settings"]["model"]
    assert found["adapters"] == [{"name": str(tmp_path / "adapter"), "scale": 0.5}]
    assert found["digest"] != plain["digest"]


def test_categories_have_figures_of_their_own(runtime, drawn):
    results = evaluate(runtime, PLAIN, drawn / "ask.jsonl", Options())
    parts = results["categories"]
    assert set(parts) == {"even", "odd"}
    assert sum(part["accuracy"]["n"] for part in parts.values()) == results["n"] == 12
    weighed = sum(6 * part["accuracy"]["value"] for part in parts.values()) / 12
    assert results["figures"]["accuracy"]["value"] == pytest.approx(weighed)


@pytest.mark.parametrize("style", ["chat", "base"])
def test_examples_stand_before_questions(runtime, drawn, style):
    path, train = drawn / "ask.jsonl", drawn / "train.jsonl"
    options = Options(shots=2, shots_from=train, seed=3, style=style)
    solved = _open(runtime, PLAIN, path, options).shots(0)
    shots = [Shot(case.images, case.answers[0], case.question) for case in solved]
    base = style == "base"
    shown = (
        {"shot_style": "vqa", "stop": PLAIN.stop} if base else {"shot_style": "chat"}
    )
    scores = []
    for row in rows_of(path):
        said = say(runtime, drawn, row, row["question"], shots=shots, **shown)
        scores.append(vqa_accuracy(Asker(PLAIN, base).cut(said), [row["answer"]]))
    results = evaluate(runtime, PLAIN, path, options)
    assert results["figures"]["accuracy"]["value"] == mean(scores)
    assert results["settings"]["style"] == style


def test_the_draw_of_examples_is_the_seeds(runtime, drawn):
    path, train = drawn / "ask.jsonl", drawn / "train.jsonl"

    def draws(**changes):
        options = Options(shots=3, shots_from=train, **changes)
        run = _open(runtime, PLAIN, path, options)
        return [[shot.origin for shot in run.shots(row)] for row in range(len(run))]

    once = draws(seed=0)
    assert once == draws(seed=0) != draws(seed=1)
    assert all(shots == once[0] for shots in once)
    fresh = draws(seed=0, fresh_shots=True)
    assert fresh == draws(seed=0, fresh_shots=True)
    assert len({tuple(shots) for shots in fresh}) > 6
    assert all(len(set(shots)) == 3 for shots in fresh)


def test_examples_are_not_drawn_from_what_is_asked(runtime, drawn):
    path = drawn / "ask.jsonl"
    for options, message in (
        ({"shots": 2}, "give both, a number of solved examples"),
        ({"shots": 2, "shots_from": path}, "is what is asked, too"),
        ({"shots": 13, "shots_from": drawn / "train.jsonl"}, "too few to draw 13"),
    ):
        with pytest.raises(DataError, match=message):
            evaluate(runtime, PLAIN, path, Options(**options))


def test_an_ended_run_goes_on_where_it_was(runtime, drawn, tmp_path):
    path, whole = drawn / "ask.jsonl", tmp_path / "whole"
    expected = evaluate(runtime, PLAIN, path, Options(), out=whole)
    assert json.loads((whole / "results.json").read_text()) == expected
    lines = (whole / "answers.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 12
    # A killed run's file ends anywhere.
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "run.json").write_text((whole / "run.json").read_text())
    (cut / "answers.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
    told = []
    found = evaluate(
        *(runtime, PLAIN, path, Options()), out=cut, progress=lambda *x: told.append(x)
    )
    assert found == expected
    assert told[0] == ("vqa", 5, 12)
    assert sorted((cut / "answers.jsonl").read_text().splitlines()) == sorted(
        line.rstrip("\n") for line in lines
    )


def test_nothing_is_asked_twice(runtime, drawn, tmp_path, monkeypatch):
    path = drawn / "ask.jsonl"
    expected = evaluate(runtime, PLAIN, path, Options(), out=tmp_path)
    monkeypatch.setattr("mm1_mlx.eval.run.Asker.ask", None)
    assert evaluate(runtime, PLAIN, path, Options(), out=tmp_path) == expected


def test_a_folder_of_another_run_is_left_alone(runtime, drawn, tmp_path):
    evaluate(runtime, PLAIN, drawn / "ask.jsonl", Options(limit=2), out=tmp_path)
    with pytest.raises(DataError, match=r"another run, whose \['tiled'\] differ"):
        evaluate(
            *(runtime, PLAIN, drawn / "ask.jsonl", Options(limit=2, tiled=1)),
            out=tmp_path,
        )
    (tmp_path / "answers.jsonl").write_text("nonsense\n")
    with pytest.raises(DataError, match=r"answers.jsonl:1: no answer of a run"):
        evaluate(runtime, PLAIN, drawn / "ask.jsonl", Options(limit=2), out=tmp_path)
    hold = Hold(tmp_path)
    with pytest.raises(CheckpointError, match="another run is at work"):
        evaluate(runtime, PLAIN, drawn / "ask.jsonl", Options(limit=2), out=tmp_path)
    hold.release()


def test_more_rows_of_the_same_file_are_asked_later(
    runtime, drawn, tmp_path, monkeypatch
):
    monkeypatch.chdir(drawn)
    path, told = Path("ask.jsonl"), []
    expected = evaluate(runtime, PLAIN, path, Options(limit=4))
    evaluate(runtime, PLAIN, path.resolve(), Options(limit=2), out=tmp_path)
    found = evaluate(
        *(runtime, PLAIN, path, Options(limit=4)),
        out=tmp_path,
        progress=lambda *x: told.append(x),
    )
    assert told[0] == ("vqa", 2, 4)
    assert found == expected


@pytest.mark.parametrize("changed", ["answer", "picture", "folder", "example"])
def test_answers_to_something_else_are_not_counted(runtime, drawn, tmp_path, changed):
    """The change is where no digest of a file's ends would see it."""
    folders = [tmp_path / name for name in ("a", "b")]
    for folder, source in zip(folders, ("0.png", "1.png"), strict=True):
        folder.mkdir()
        (folder / "x.png").write_bytes((drawn / source).read_bytes())
    row = {"image": "x.png", "question": "What colour is it?", "answer": "red"}
    rows = [row | {"filler": "z" * 70_000}, row, row | {"filler": "z" * 70_000}]
    path, train = write(tmp_path / "rows.jsonl", rows), tmp_path / "train.jsonl"
    shots = [row | {"answer": "two"}] * 2
    write(train, shots)
    more = {"shots": 2, "shots_from": train} if changed == "example" else {}
    options = Options(image_folder=folders[0], **more)
    out = tmp_path / "out"
    first = evaluate(runtime, PLAIN, path, options, out=out)
    assert evaluate(runtime, PLAIN, path, options, out=out) == first
    match changed:
        case "answer":
            write(path, [rows[0], row | {"answer": "sky"}, rows[2]])
        case "picture":
            (folders[0] / "x.png").write_bytes((drawn / "2.png").read_bytes())
        case "folder":
            options = Options(image_folder=folders[1])
        case "example":
            write(train, [row | {"answer": "six"}] * 2)
    with pytest.raises(
        DataError, match=r"holds an answer to .*rows.jsonl:\d as it was"
    ):
        evaluate(runtime, PLAIN, path, options, out=out)


def test_a_file_of_somebody_else_is_not_written_over(tmp_path):
    write(tmp_path / "results.json", [{"my": "results"}])
    with pytest.raises(DataError, match=r"results.json stands, but not what was asked"):
        Log(tmp_path, {})
    # Nor a training run's settings, which no answers stand beside.
    (tmp_path / "results.json").unlink()
    write(tmp_path / "run.json", [{"config": {}}])
    with pytest.raises(DataError, match=r"differ; give another --out"):
        Log(tmp_path, {"task": "pope"})
    assert rows_of(tmp_path / "run.json") == [{"config": {}}]


def test_a_run_without_answers_does_not_hold_its_folder(tmp_path):
    for task in ("pope", "vqav2"):
        Log(tmp_path, {"task": task}).__exit__(None, None, None)
    assert json.loads((tmp_path / "run.json").read_text()) == {"task": "vqav2"}
    with Log(tmp_path, {"task": "vqav2"}) as log:
        log.add({"row": 0, "error": "broken"})
    with pytest.raises(DataError, match=r"another run, whose \['task'\] differ"):
        Log(tmp_path, {"task": "pope"})


@pytest.mark.parametrize(
    "line",
    [
        {"row": []}, {"row": True, "answer": "x", "asked": ""}, {"row": 0}, [],
        {"row": 0, "answer": 5, "asked": ""}, {"row": -1, "answer": "x", "asked": ""},
        {"row": 0, "error": 3}, {"row": 0, "answer": "x"},
        {"row": 0, "answer": "x", "asked": "", "boxes": [[1]]},
        {"row": 0, "answer": "x", "asked": "", "unended": 1},
        {"row": 0, "logprobs": [-1.0], "greedy": [], "asked": ""},
    ],
)  # fmt: skip
def test_lines_that_are_no_answers_are_named(tmp_path, line):
    Log(tmp_path, {}).__exit__(None, None, None)
    write(tmp_path / "answers.jsonl", [line])
    with pytest.raises(DataError, match=r"answers.jsonl:1: no answer of a run"):
        Log(tmp_path, {})


@pytest.mark.parametrize(
    ("task", "name", "key"),
    [("rank", "likelihood", "logprobs"), ("box", "box", "boxes")],
)
def test_answers_of_other_kinds_are_not_counted(
    runtime, drawn, tmp_path, task, name, key
):
    path, options = drawn / f"{task}.jsonl", Options(limit=1)
    evaluate(runtime, TASKS[name], path, options, out=tmp_path)
    (line,) = rows_of(tmp_path / "answers.jsonl")
    del line[key]
    write(tmp_path / "answers.jsonl", [line | {"answer": "red"}])
    with pytest.raises(DataError, match=rf"that is none of {name}; remove the line of"):
        evaluate(runtime, TASKS[name], path, options, out=tmp_path)


def test_no_stop_at_all_may_be_asked_for(runtime, drawn):
    task = altered(TASKS["vqa"], stop=[])
    results = evaluate(runtime, task, drawn / "ask.jsonl", Options(limit=1))
    assert results["settings"]["task"]["stop"] == []


def test_a_full_disk_is_told_with_the_files_name(tmp_path, monkeypatch):
    # After a few bytes, as a disk is full.
    room = iter((4, None))

    def write(data):
        if (taken := next(room)) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return min(taken, len(data))

    with Log(tmp_path, {}) as log:
        file = SimpleNamespace(write=write, close=log._journal.file.close)
        monkeypatch.setattr(log._journal, "file", file)
        with pytest.raises(
            DataError, match=r"answers.jsonl cannot be written: No space"
        ):
            log.add({"row": 0})

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("mm1_mlx.eval.log.replace_json", full)
        with pytest.raises(
            DataError, match=r"results.json cannot be written: No space"
        ):
            log.finish({})
    with pytest.raises(DataError, match=r"run.json cannot be written: No space"):
        Log(tmp_path / "other", {})


def test_names_that_are_not_utf_8_do_not_end_a_run(runtime, drawn, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    row = rows_of(drawn / "ask.jsonl")[0]
    (folder / row["image"]).write_bytes((drawn / row["image"]).read_bytes())
    path, out = write(folder / "rows.jsonl", [row]), tmp_path / "out"
    results = evaluate(runtime, PLAIN, path, Options(), out=out)
    assert results["settings"]["data"]["path"].endswith("?/rows.jsonl")
    assert json.loads((out / "results.json").read_text()) == results
    assert evaluate(runtime, PLAIN, path, Options(), out=out) == results
    odd = path.rename(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")))
    with pytest.raises(DataError, match=r"\?.jsonl has a name that is not UTF-8"):
        evaluate(runtime, PLAIN, odd, Options())


def test_captions_are_scored_among_all_pictures_in_each_category(
    runtime, drawn, tmp_path
):
    rows = rows_of(drawn / "caption.jsonl")[:4]
    for i, row in enumerate(rows):
        (tmp_path / row["image"]).write_bytes((drawn / row["image"]).read_bytes())
        row["category"] = str(i)
    path = write(tmp_path / "rows.jsonl", rows)
    results = evaluate(runtime, TASKS["caption"], path, Options())
    parts = [held["cider"]["value"] for held in results["categories"].values()]
    whole = results["figures"]["cider"]["value"]
    assert whole > 0
    assert sum(parts) / 4 == pytest.approx(whole)
    write(path, [*rows, rows[1]])
    with pytest.raises(
        DataError, match=r"rows.jsonl:5: its picture is that of .*:2, too"
    ):
        evaluate(runtime, TASKS["caption"], path, Options())


def test_a_question_of_a_picture_is_not_asked_blindly(runtime, drawn):
    row = rows_of(drawn / "ask.jsonl")[0]
    row["photo"] = row.pop("image")
    path = write(drawn / "blind.jsonl", [row])
    for task in ("vqav2", "docvqa", "chartqa"):
        with pytest.raises(DataError, match=r"blind.jsonl:1: the row has no images"):
            evaluate(runtime, TASKS[task], path, Options())
    assert evaluate(runtime, TASKS["exact"], path, Options())["without_picture"] == 1


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    ("shot", "message"),
    [
        ({"image": "no.png", "question": "x", "answer": "y"}, "no.png' was not found"),
        ({"image": "0.png", "question": "x"}, "the row has no answers"),
    ],
)
def test_a_bad_example_is_told_as_such(runtime, drawn, fresh, shot, message):
    train = write(drawn / "bad-train.jsonl", [shot] * 2)
    options = Options(shots=2, shots_from=train, fresh_shots=fresh, skip_bad=True)
    with pytest.raises(DataError, match=rf"bad-train.jsonl:\d: .*{message}"):
        evaluate(runtime, PLAIN, drawn / "ask.jsonl", options)


def test_what_would_be_of_no_effect_is_refused(runtime, drawn, tmp_path):
    path, train = drawn / "ask.jsonl", drawn / "train.jsonl"
    stopped = altered(TASKS["vqa"], stop=["!"])
    with pytest.raises(DataError, match="--stop '!' ends only a base model's answer"):
        evaluate(runtime, stopped, path, Options())
    results = evaluate(runtime, stopped, path, Options(style="base", limit=1))
    assert results["settings"]["task"]["stop"] == ["!"]
    results = evaluate(runtime, TASKS["vqa"], path, Options(limit=1))
    assert results["settings"]["task"]["stop"] == []
    (tmp_path / "link.jsonl").symlink_to(path)
    options = Options(shots=1, shots_from=tmp_path / "link.jsonl")
    with pytest.raises(DataError, match="is what is asked, too"):
        evaluate(runtime, PLAIN, path, options)
    options = Options(shots=1, shots_from=train)
    with pytest.raises(DataError, match="refcoco has no examples to show"):
        evaluate(runtime, TASKS["refcoco"], drawn / "box.jsonl", options)


def test_a_box_lies_in_its_picture(runtime, drawn):
    row = rows_of(drawn / "box.jsonl")[0] | {"box": [50, 50, 120, 90]}
    path = write(drawn / "outside.jsonl", [row])
    with pytest.raises(
        DataError, match=r"outside.jsonl:1: box is .* of 96 x 96 pixels"
    ):
        evaluate(runtime, TASKS["box"], path, Options())


BAD = (
    '{"image": "0.png", "question": "What colour is it?", "answer": "red"}\n'
    "nonsense\n"
    '{"image": "none.png", "question": "What colour is it?", "answer": "red"}\n'
    '{"image": "../etc/passwd", "question": "What is it?", "answer": "red"}\n'
    '{"image": "1.png", "question": "What shape is it?", "answer": "star"}\n'
    '{"image": "1.png", "answer": "star"}\n'
)


@pytest.mark.parametrize("task", ["vqa", "likelihood"])
def test_bad_rows_are_named_or_passed_over(runtime, drawn, task):
    path = drawn / f"bad-{task}.jsonl"
    rows = BAD.replace('"answer"', '"choices": ["red", "star"], "answer"')
    path.write_text(rows if task == "likelihood" else BAD)
    with pytest.raises(DataError, match=rf"bad-{task}.jsonl:\d: "):
        evaluate(runtime, TASKS[task], path, Options())
    results = evaluate(runtime, TASKS[task], path, Options(skip_bad=True))
    assert (results["n"], results["skipped"]) == (2, 4)
    places = [error.split(": ")[0].rsplit(":", 1)[1] for error in results["bad_rows"]]
    assert places == ["2", "3", "4", "6"]


def test_a_file_without_a_sound_row_has_no_figures(runtime, tmp_path):
    (tmp_path / "rows.jsonl").write_text("nonsense\n")
    with pytest.raises(DataError, match="none of the 1 rows could be asked"):
        evaluate(runtime, PLAIN, tmp_path / "rows.jsonl", Options(skip_bad=True))
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no rows"):
        evaluate(runtime, PLAIN, tmp_path / "rows.jsonl", Options())
    with pytest.raises(DataError, match="is a folder"):
        evaluate(runtime, PLAIN, tmp_path, Options())


def test_a_bad_row_is_asked_again_when_the_run_goes_on(runtime, drawn, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"image": "new.png", "question": "What?", "answer": "red"}\n' * 2)
    (tmp_path / "new.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    with pytest.raises(DataError, match="none of the 2 rows"):
        evaluate(runtime, PLAIN, rows, Options(skip_bad=True), out=out)
    (tmp_path / "new.png").write_bytes((drawn / "0.png").read_bytes())
    assert evaluate(runtime, PLAIN, rows, Options(skip_bad=True), out=out)["n"] == 2


@pytest.mark.slow
def test_a_killed_command_goes_on(drawn, tmp_path):
    out = tmp_path / "out"
    code = (
        "import sys; from mm1_mlx.apps.cli import main; "
        f"sys.argv = ['mm1', 'eval', 'coco-caption', {str(drawn / 'caption.jsonl')!r}, "
        f"'--out', {str(out)!r}, '--json']; main()"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.Popen(command, stdout=subprocess.PIPE)
    answers = out / "answers.jsonl"
    while not answers.exists() or answers.read_bytes().count(b"\n") < 3:
        assert run.poll() is None
        time.sleep(0.002)
    run.kill()
    run.wait()
    run.stdout.close()
    before = answers.read_bytes().count(b"\n")
    done = subprocess.run(command, capture_output=True, check=True)
    results = json.loads(done.stdout)
    assert results["n"] == 12
    assert before >= 3
    rows = [json.loads(line)["row"] for line in answers.read_text().splitlines()]
    assert sorted(rows) == list(range(12))
