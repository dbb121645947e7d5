"""Options and commands that save work: the same answers, and less of it."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.quantize import larger
from mm1_mlx.apps.cli import main
from mm1_mlx.runtime import TINY

STAR = str(TINY / "red-star.png")
FOUR = str(TINY / "four-shapes.png")
COLOUR = "What colour is the star?"
DESCRIBE = "Describe the picture."
DESCRIPTION = "A yellow circle, a purple heart, a blue square and a green triangle.\n"


@pytest.fixture
def mm1(monkeypatch, capfd, tmp_path):
    """Run the command with a cache folder of its own; exit status, stdout, stderr."""
    monkeypatch.setenv("MM1_CACHE", str(tmp_path / "cache"))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mm1", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run


def test_a_prefix_is_saved_used_listed_and_dropped(mm1, embedded):
    code, out, err = mm1("prefix", "save", "star", "-i", STAR)
    assert (code, out) == (0, "")
    assert "tokens kept; ask behind it with --prefix star" in err
    assert mm1("generate", "--prefix", "star", "-p", COLOUR)[:2] == (0, "red\n")
    answer = json.loads(mm1("generate", "--prefix", "star", "-p", COLOUR, "--json")[1])
    assert answer["cached_tokens"] >= answer["image_tokens"]
    assert answer["image_tokens"] == embedded.num_image_tokens
    code, out, _ = mm1("prefix", "list")
    assert code == 0
    assert out.startswith("star  ")
    assert "pictures: 1" in out
    (one,) = json.loads(mm1("prefix", "list", "--json")[1])
    assert (one["name"], one["pictures"]) == ("star", 1)
    assert mm1("prefix", "drop", "star")[0] == 0
    assert mm1("prefix", "list") == (
        0, "", "no prefixes; save one with 'mm1 prefix save NAME'\n",
    )  # fmt: skip


def test_examples_are_kept_too(mm1, tmp_path):
    shots = tmp_path / "shots.jsonl"
    row = {"image": FOUR, "question": "How many shapes are there?", "answer": "4"}
    shots.write_text(json.dumps(row) + "\n")
    assert mm1("prefix", "save", "count", "--shots", shots)[0] == 0
    question = ("-i", FOUR, "-p", "How many shapes are there?")
    whole = mm1("generate", "--shots", shots, *question)
    assert mm1("generate", "--prefix", "count", *question) == whole


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (("prefix", "save", "x"), 2, "give -i, --shots or --system"),
        (("prefix", "save", "../x", "--system", "a"), 1, "prefix name '../x' is not"),
        (("prefix", "save", "x", "-i", "none.png"), 1, "'none.png' was not found"),
        (("prefix", "drop", "x"), 1, "there is no prefix 'x'"),
        (("generate", "--prefix", "x", "-p", "a"), 1, "there is no prefix 'x', known:"),
        (("generate", "--kv-bits", "5", "-p", "a"), 1, "kv_bits is 5, expected one of"),
        (
            ("generate", "-p", "a", "--prompt-lookup", "--draft-model", "x"),
            2,
            "both guess",
        ),
        (("generate", "-p", "a", "--draft-model", "x"), 1, "model folder 'x' does not"),
        (("generate", "-p", "a", "--kv-start", "1"), 2, "--kv-start needs --kv-bits"),
        (
            ("chat", "--num-draft-tokens", "3"),
            2,
            "--num-draft-tokens needs --draft-model",
        ),
    ],
)
def test_mistakes_are_one_line(mm1, arguments, code, match):
    status, out, err = mm1(*arguments)
    assert (status, out) == (code, "")
    assert match in " ".join(err.replace("│", " ").split())
    if code == 1:
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--prompt-lookup"],
        ["--draft-model", TINY],
        ["--draft-model", TINY, "--num-draft-tokens", "2"],
        ["--kv-bits", "8", "--kv-start", "0"],
    ],
)
def test_answers_stay_the_same(mm1, options):
    code, out, err = mm1("generate", "-i", FOUR, "-p", DESCRIBE, *options)
    assert (code, out, err) == (0, DESCRIPTION, "")


def test_pictures_are_kept_for_another_process(mm1, monkeypatch, tmp_path):
    monkeypatch.setenv("MM1_FEATURES", str(tmp_path / "features"))
    for _ in range(2):
        assert mm1("generate", "-i", STAR, "-p", COLOUR)[:2] == (0, "red\n")
    (kept,) = (tmp_path / "features").iterdir()
    assert kept.suffix == ".safetensors"


def test_two_processes_answer_as_one(hosts, mm1, tmp_path):
    model = larger(tmp_path / "model")
    asked = ("-m", model, "-i", FOUR, "-p", DESCRIBE, "--max-tokens", "12")
    code, alone, _ = mm1("generate", *asked)
    assert (code, len(alone.split()) > 1) == (0, True)
    command = [Path(sys.executable).with_name("mm1"), "generate", *asked, "-v"]
    ring = [
        subprocess.Popen(
            command,
            env=os.environ | {"MLX_HOSTFILE": hosts, "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    (first, noted), (second, nothing) = (p.communicate(timeout=120) for p in ring)
    assert (first, second) == (alone, "")
    assert "tokens at" in noted
    assert nothing == ""


@pytest.mark.parametrize("hosts", [None, "missing", "damaged", "short", "rank"])
def test_processes_that_do_not_find_each_other_are_one_line(
    mm1, monkeypatch, tmp_path, hosts
):
    monkeypatch.setenv("MLX_RANK", {"short": "1", "rank": "x"}.get(hosts, "0"))
    monkeypatch.delenv("MLX_HOSTFILE", raising=False)
    if hosts:
        file = tmp_path / hosts
        monkeypatch.setenv("MLX_HOSTFILE", str(file))
        if hosts != "missing":
            file.write_text('[["127.0.0.1:5000"]]' if hosts == "short" else "{")
    code, out, err = mm1("generate", "-p", "hi")
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: this process finds no others to run with .*\n", err)
    assert "unset MLX_RANK to run alone" in err
