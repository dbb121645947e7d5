"""``mm1 caption``: every picture once, whatever stops the run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from mm1_mlx.apps.cli import main
from mm1_mlx.runtime import TINY

STAR, FOUR = TINY / "red-star.png", TINY / "four-shapes.png"
SAID = {"star": "A red star.", "four": "A yellow circle, a purple heart"}


@pytest.fixture
def mm1(monkeypatch, capfd):
    """Run the command; exit status, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mm1", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run


@pytest.fixture
def folder(tmp_path):
    """Two pictures, one in a folder, and one that is none."""
    folder = tmp_path / "my photos"
    (folder / "a [b]").mkdir(parents=True)
    shutil.copy(STAR, folder / "star ü.png")
    shutil.copy(FOUR, folder / "a [b]/four.PNG")
    (folder / "a [b]/bad.jpg").write_text("no picture")
    (folder / "notes.txt").write_text("not looked at")
    return folder


def rows_of(path):
    header, *rows = map(json.loads, path.read_text().splitlines())
    assert header["captions"] == 1
    return {row["file"]: row for row in rows}


def test_every_picture_has_a_line_and_a_bad_one_its_error(mm1, folder):
    code, out, err = mm1("caption", folder)
    path = folder / "captions.jsonl"
    assert (code, out) == (1, "")
    assert err == f"2 captions, 1 error: {path}\n"
    rows = rows_of(path)
    assert rows["star ü.png"]["caption"] == SAID["star"]
    assert rows["star ü.png"]["finish_reason"] == "stop"
    assert rows["a [b]/four.PNG"]["caption"].startswith(SAID["four"])
    assert set(rows["a [b]/bad.jpg"]) == {"file", "error"}
    assert "is not a PNG" in rows["a [b]/bad.jpg"]["error"]


def test_a_run_that_is_given_again_asks_nothing_twice(mm1, folder, monkeypatch):
    mm1("caption", folder, "--exclude", "*.jpg")
    before = (folder / "captions.jsonl").read_bytes()
    monkeypatch.setattr("mm1_mlx.captions.run._row", pytest.fail)
    code, _, err = mm1("caption", folder)
    assert code == 1
    assert err.startswith("2 captions, 1 error (2 from before)")
    after = (folder / "captions.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == before.count(b"\n") + 1


def test_a_line_that_was_cut_is_written_again(mm1, folder):
    mm1("caption", folder)
    path = folder / "captions.jsonl"
    whole = path.read_bytes()
    # In the middle of a line, of a character, of the first line.
    for cut in (len(whole) - 10, whole.index("ü".encode()) + 1, 5):
        path.write_bytes(whole[:cut])
        assert mm1("caption", folder)[0] == 1
        assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("-p", "What?"), "with prompt 'Describe the picture.', not 'What?'"),
        (("--system", "Be brief."), "with system None, not 'Be brief.'"),
        (("--max-tokens", "7"), "with max_tokens 256, not 7"),
        (("--resolution", "192"), "with resolution '96', not '192'"),
    ],
)
def test_captions_of_another_question_or_model_are_not_mixed(
    mm1, folder, arguments, match
):
    mm1("caption", folder)
    before = (folder / "captions.jsonl").read_bytes()
    code, _, err = mm1("caption", folder, *arguments)
    assert code == 1
    assert match in err
    assert err.count("\n") == 1
    assert (folder / "captions.jsonl").read_bytes() == before
    code, _, err = mm1("caption", folder, *arguments, "--overwrite")
    assert err.startswith("2 captions, 1 error: ")
    assert len(rows_of(folder / "captions.jsonl")) == 3


def test_a_model_is_known_by_its_digest(mm1, folder):
    mm1("caption", folder)
    path = folder / "captions.jsonl"
    lines = path.read_text()
    path.write_text(lines.replace('"model": "tiny"', '"model": "renamed"'))
    assert mm1("caption", folder)[2].startswith("2 captions, 1 error (3 from before)")
    header = json.loads(lines.partition("\n")[0])
    path.write_text(lines.replace(header["digest"], "0" * 64))
    code, _, err = mm1("caption", folder)
    assert code == 1
    assert f"another model or adapter: 'tiny {'0' * 12}', not 'tiny " in err


@pytest.mark.parametrize("content", ['{"file": "a.png"}\n', "hello\n", "[1]\n", "1\n"])
def test_other_files_are_not_written_to(mm1, folder, content):
    other = folder.parent / "other.jsonl"
    other.write_text(content)
    for extra in ((), ("--overwrite",)):
        code, _, err = mm1("caption", folder, "-o", other, *extra)
        assert code == 1
        assert "is no file of captions that is known here; give another --out" in err
        assert other.read_text() == content


def test_a_foreign_line_among_the_captions_is_named(mm1, folder):
    mm1("caption", folder)
    path = folder / "captions.jsonl"
    path.write_text(path.read_text() + '{"caption": "of what?"}\n')
    code, _, err = mm1("caption", folder)
    assert code == 1
    assert "captions.jsonl:5: no line of a picture; remove it to go on" in err


def test_two_runs_do_not_write_one_file(mm1, folder):
    import fcntl

    mm1("caption", folder)
    with (folder / "captions.jsonl").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, _, err = mm1("caption", folder, "--overwrite")
    assert code == 1
    assert "is being written by another run" in err
    assert len(rows_of(folder / "captions.jsonl")) == 3


def test_patterns_choose(mm1, folder):
    def chosen(*patterns):
        out = folder.parent / "out.jsonl"
        mm1("caption", folder, "-o", out, "--overwrite", *patterns)
        return set(rows_of(out))

    assert chosen("--include", "star*") == {"star ü.png"}
    assert chosen("--include", "a*/*", "--exclude", "bad.*") == {"a [b]/four.PNG"}
    assert chosen("--include", "*.png", "--include", "*.jpg") >= {"a [b]/bad.jpg"}
    code, _, err = mm1("caption", folder, "--include", "none")
    assert code == 1
    assert "holds no pictures, 3 others match no --include" in err


def test_no_folder_and_no_pictures_are_one_line(mm1, folder):
    assert "does not exist; give a folder" in mm1("caption", folder / "no")[2]
    assert "is a file; give a folder" in mm1("caption", folder / "notes.txt")[2]
    (folder / "empty/.hidden").mkdir(parents=True)
    shutil.copy(STAR, folder / "empty/.hidden/a.png")
    shutil.copy(STAR, folder / "empty/._a.png")
    assert "holds no pictures, expected .avif" in mm1("caption", folder / "empty")[2]
    assert mm1("caption", folder, "--sidecar", "txt", "-o", "x")[0] == 2


def test_links_in_a_circle_are_walked_once(mm1, folder):
    (folder / "a [b]/up").symlink_to(folder)
    (folder / "again").symlink_to(folder / "a [b]")
    (folder / "nowhere.png").symlink_to(folder / "gone.png")
    mm1("caption", folder)
    rows = rows_of(folder / "captions.jsonl")
    assert set(rows) == {
        "a [b]/bad.jpg", "a [b]/four.PNG", "star ü.png", "nowhere.png"
    }  # fmt: skip
    assert "was not found" in rows["nowhere.png"]["error"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_stops_nothing(mm1, folder):
    (folder / "star ü.png").chmod(0)
    (folder / "locked").mkdir(0)
    code, _, err = mm1("caption", folder, "--exclude", "bad*")
    assert code == 1
    assert "passed over: " in err
    assert (
        "cannot be opened" in rows_of(folder / "captions.jsonl")["star ü.png"]["error"]
    )


@pytest.mark.skipif(sys.platform == "darwin", reason="names are UTF-8 there")
def test_names_that_are_not_utf8_come_back(mm1, folder):
    name = os.fsdecode(b"\xff.png")
    shutil.copy(STAR, folder / name)
    mm1("caption", folder)
    assert rows_of(folder / "captions.jsonl")[name]["caption"] == SAID["star"]
    assert "(4 from before)" in mm1("caption", folder)[2]


def test_sidecars_stand_beside_their_pictures(mm1, folder):
    shutil.copy(STAR, folder / "four.jpg")
    shutil.copy(STAR, folder / "Four.png")
    shutil.copy(STAR, folder / "star ü.png.bmp")
    code, out, err = mm1("caption", folder, "--sidecar", "txt")
    assert (code, out) == (1, "")
    assert "a [b]/bad.jpg: " in err
    assert err.endswith("5 captions, 1 error: .txt files beside the pictures\n")
    texts = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*.txt")}
    star = SAID["star"] + "\n"
    assert texts.pop("a [b]/four.txt").startswith(SAID["four"])
    assert texts.pop("notes.txt") == "not looked at"
    assert texts == {
        "star ü.txt": star, "four.jpg.txt": star, "Four.png.txt": star,
        "star ü.png.bmp.txt": star,
    }  # fmt: skip
    assert not list(folder.rglob("*.partial"))


def test_a_sidecar_that_is_there_stays_unless_told(mm1, folder):
    (folder / "star ü.txt").write_text("mine")
    arguments = ("caption", folder, "--sidecar", "txt", "--exclude", "bad*")
    assert mm1(*arguments)[2].startswith("2 captions, 0 errors (1 from before)")
    assert (folder / "star ü.txt").read_text() == "mine"
    code, _, err = mm1(*arguments, "--overwrite")
    assert (code, err.partition(":")[0]) == (0, "2 captions, 0 errors")
    assert (folder / "star ü.txt").read_text() == SAID["star"] + "\n"


def schema_file(folder, **changes):
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["a star", "many shapes"]}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    path = folder.parent / "schema.json"
    path.write_text(json.dumps(schema | changes))
    return path


def test_a_schema_gives_an_object_of_each_picture(mm1, folder):
    schema = schema_file(folder)
    arguments = ("caption", folder, "--schema", schema, "--exclude", "bad*")
    assert mm1(*arguments)[0] == 0
    rows = rows_of(folder / "captions.jsonl")
    assert {row["data"]["kind"] for row in rows.values()} <= {"a star", "many shapes"}
    assert mm1(*arguments, "--sidecar", "json")[0] == 0
    beside = json.loads((folder / "star ü.json").read_text())
    assert beside == {"data": rows["star ü.png"]["data"], "finish_reason": "stop"}
    schema_file(folder, required=[])
    assert "was begun with schema" in mm1(*arguments)[2]


def test_what_is_cut_says_so(mm1, folder):
    arguments = ("caption", folder, "--max-tokens", "2", "--exclude", "bad*")
    assert mm1(*arguments)[0] == 0
    rows = rows_of(folder / "captions.jsonl")
    assert {row["finish_reason"] for row in rows.values()} == {"length"}
    schema = schema_file(folder)
    code, _, err = mm1(*arguments, "--schema", schema, "--overwrite")
    assert (code, err.partition(":")[0]) == (1, "0 captions, 2 errors")
    row = rows_of(folder / "captions.jsonl")["star ü.png"]
    assert row["error"].startswith("the answer had not ended after 2 tokens")
    assert row["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "is not valid JSON"),
        ("[]", "the schema is list, expected a JSON object"),
        ('{"type": "nonsense"}', "the schema cannot be held to"),
    ],
)
def test_what_is_wrong_for_every_picture_is_said_once(mm1, folder, content, match):
    path = folder.parent / "schema.json"
    path.write_text(content)
    code, _, err = mm1("caption", folder, "--schema", path)
    assert code == 1
    assert match in err
    assert err.count("\n") == 1
    code, _, err = mm1("caption", folder, "-p", "star " * 1100, "--overwrite")
    assert code == 1
    assert "context holds 1,024" in err
    assert err.count("\n") == 1


def test_generate_takes_a_schema_too(mm1, folder):
    schema = schema_file(folder)
    code, out, _ = mm1("generate", "-p", "What is it?", "-i", STAR, "--schema", schema)
    assert code == 0
    assert json.loads(out)["kind"] in ("a star", "many shapes")


# Writes a letter for every picture whose caption is begun; damaged ones have none.
COUNTING = """
import sys
from mm1_mlx.blas import preload_blas
preload_blas()
from mm1_mlx.apps.cli import main
from mm1_mlx.engine import Engine

open_request = Engine.open
log = open(sys.argv.pop(1), "ab", buffering=0)

def counted(*arguments, **options):
    log.write(b"x")
    return open_request(*arguments, **options)

Engine.open = counted
main()
"""


@pytest.mark.drill
def test_a_thousand_pictures_twice_killed(tmp_path):
    folder, out = tmp_path / "photos", tmp_path / "out.jsonl"
    folder.mkdir()
    stream = np.random.default_rng(0)
    bad = set(stream.choice(1000, 20, replace=False).tolist())
    star, four = (
        Image.open(path).convert("RGB").resize((96, 96)) for path in (STAR, FOUR)
    )
    for number in range(1000):
        noise = stream.integers(0, 8, (96, 96, 3), dtype=np.uint8)
        picture = np.asarray((star, four)[number % 2]) // 8 * 8 + noise
        path = folder / f"{number:04}.png"
        Image.fromarray(picture.astype(np.uint8)).save(path)
        if number in bad:
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2] if number % 2 else b"no picture")
    counting = tmp_path / "counting.py"
    counting.write_text(COUNTING)
    asked = tmp_path / "asked"
    command = [
        sys.executable, counting, asked, "caption", folder, "-o", out,
        "--batch-size", "16",
    ]  # fmt: skip
    for most in (300, 700):
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not out.exists() or out.read_bytes().count(b"\n") < most:
            assert child.poll() is None
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
        kept = out.read_bytes()
        # As a line is cut by a machine that goes down.
        out.write_bytes(kept + b'{"file": "0')
        # Of each run at most a batch was computed and not kept.
        lost = len(asked.read_bytes()) - kept.count(b'"caption":')
        assert 0 <= lost <= (16 if most == 300 else 32)
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("980 captions, 20 errors (")
    whole = out.read_bytes()
    assert whole.startswith(kept)
    rows = [json.loads(line) for line in whole.splitlines()][1:]
    assert len(rows) == len({row["file"] for row in rows}) == 1000
    assert {int(row["file"][:4]) for row in rows if "error" in row} == bad
    assert SAID["star"] in {row.get("caption") for row in rows}
    assert 980 <= len(asked.read_bytes()) <= 980 + 2 * 16
