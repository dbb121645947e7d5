"""What the README shows is what happens, and what it lists is what there is."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import adapters, growth, quantize
from benchmarks.peers.rows import table
from mm1_mlx import generate, load
from mm1_mlx.convert.detect import formats, name_of
from mm1_mlx.files import sha256
from mm1_mlx.presets import PRESETS
from mm1_mlx.runtime import TINY

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MEASURED = (ROOT / "benchmarks/README.md").read_text()
# What was asked of the embedded model on the command line, and its answer.
ASKED = re.findall(
    r"^    \$ mm1 generate (?:-v )?-i (\S+\.png) -p \"(.*?)\"\n    (.+)$", README, re.M
)
# Python that is shown, and what it prints where that is shown behind it; but what needs a
# server.
PYTHON = [
    (name, code, printed)
    for name in ("README.md", "apps/README.md", "mm1_mlx/README.md")
    for code, printed in re.findall(
        r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?",
        (ROOT / name).read_text(),
        re.M | re.S,
    )
    if "openai" not in code
]


@pytest.fixture(scope="module")
def runtime():
    with load() as runtime:
        yield runtime


@pytest.mark.parametrize(("picture", "question", "answer"), ASKED)
def test_answers_that_are_shown_are_those_of_the_embedded_model(
    picture, question, answer, runtime
):
    assert generate(runtime, question, [TINY / picture]).text.strip() == answer


def test_four_commands_show_their_answers():
    assert len(ASKED) == 4


@pytest.mark.parametrize(
    ("pictures", "question", "answer"),
    [
        (("red-star.png", "four-shapes.png"), "What colour is the heart?", "purple"),
        (("four-shapes.png", "red-star.png"), "What colour is the star?", "red"),
    ],
)
def test_of_two_pictures_either_is_answered_from(pictures, question, answer, runtime):
    paths = [TINY / name for name in pictures]
    assert generate(runtime, question, paths).text.strip() == answer


@pytest.mark.parametrize(("name", "code", "printed"), PYTHON)
def test_python_that_is_shown_runs(name, code, printed, capsys):
    exec(compile(code, name, "exec"), {"__name__": "__main__"})
    out = capsys.readouterr().out
    assert out
    assert out == (printed or out)


def test_every_row_is_a_format_and_says_how_it_was_verified():
    """A new format's row is its author's to write: its code is one file and its test."""
    text = (ROOT / "convert/README.md").read_text()
    table = text[text.index("| format | models |") :].partition("\n\n")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| .+? \| (.+?) \|$", table, re.M))
    assert len(rows) >= 24
    assert set(rows) <= {name_of(format) for format in formats()}
    told = "Real weights were not run by us for any of them"
    assert told in text
    assert told in " ".join(README.split())


def test_every_file_of_the_runtime_is_in_the_tree():
    """Of ``config/``, one file per part of a config, the folder alone."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    tree = text[text.index("## Every file") :]
    files, folders = (set(re.findall(x, tree)) for x in (r"\w+\.py\b", r"\w+(?=/)"))
    inner = {path.parent for path in (ROOT / "mm1_mlx").rglob("*.py")}
    assert len(inner) > 10
    for folder in inner:
        assert folder.name in folders
        held = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
        assert folder.name == "config" or held <= files, folder


def test_every_preset_of_the_paper_is_listed():
    for name in PRESETS:
        assert name in README


def test_every_file_of_the_converters_is_in_their_readme():
    text = (ROOT / "convert/README.md").read_text()
    for path in (ROOT / "convert").glob("*.py"):
        assert path.name == "__init__.py" or f"`{path.name}`" in text, path.name


def test_what_stands_beside_the_peers_is_what_was_measured():
    results = ROOT / "benchmarks/results"
    parts = json.loads((results / "peers-cpu.json").read_text())["parts"]
    rows = [row for part in parts.values() for row in part["rows"]]
    rows += json.loads((results / "conversion-cpu.json").read_text())["rows"]
    assert len(rows) > 25
    assert table(rows) in MEASURED
    shown = README[README.index("## Beside the peers") :].partition("\n## ")[0]
    shown = re.findall(r"^\| .*\d.* \|$", shown, re.M)
    assert len(shown) >= 8
    assert set(shown) <= set(table(rows).splitlines())


@pytest.mark.parametrize("peer", ["lm", "vlm"])
def test_a_training_step_is_no_slower_than_a_peers_and_holds_no_more(peer):
    text = (ROOT / "benchmarks/results/peers-cpu.json").read_text()
    speed, memory = json.loads(text)["parts"][f"train-{peer}"]["rows"]
    assert (speed["unit"], memory["unit"]) == ("tokens/s", "bytes")
    assert speed["ratio"] >= 1
    assert memory["ratio"] >= 1


def test_what_the_server_does_is_what_was_measured():
    results = json.loads((ROOT / "benchmarks/results/serving-cpu.json").read_text())
    load, speed = results["load"], results["speed"]
    assert table(speed["rows"]) in MEASURED
    answers = load["answers"]
    assert not {*answers} - {"right", "left"}
    counts = (
        f"{answers['right']:,} right answers, {answers['left']:,} left, none wrong; "
    )
    half, most = load["median_seconds"], load["p95_seconds"]
    times = f"half of them were whole within {half:.1f} s, 95% within {most:.1f} s."
    assert counts + times in " ".join(MEASURED.split())


def test_how_costs_grow_is_what_was_measured():
    text = (ROOT / "benchmarks/results/growth-cpu.json").read_text()
    tables = json.loads(text)["tables"]
    assert len(tables) == 6
    for table_ in tables:
        assert growth.line(table_) in MEASURED


def test_what_packing_costs_is_what_was_measured():
    results = json.loads((ROOT / "benchmarks/results/quantize-tiny.json").read_text())
    assert results["model"] == sha256(TINY / "model.safetensors")
    assert quantize.table(results) in (ROOT / "mm1_mlx/quantize/README.md").read_text()
    tiny = results["mm1-tiny"]
    four, unpacked = (tiny[name]["accuracy"] for name in ("4bit", "float32"))
    told = f"{four:.2%} of {tiny['4bit']['n']:,} held-out questions at 4 bits"
    assert told in " ".join(README.split())
    assert f"and {unpacked:.2%} unpacked" in " ".join(README.split())


def test_what_fusing_loses_is_what_was_measured():
    results = json.loads((ROOT / "benchmarks/results/adapters-tiny.json").read_text())
    text = (ROOT / "mm1_mlx/train/README.md").read_text()
    assert results["model"] == sha256(TINY / "model.safetensors")
    assert adapters.table(results) in text
    plain, packed = results["answered"].values()
    shares = (plain["without"], plain["with"], packed["with"])
    before, after, four = (f"{x['right'] / x['n']:.1%}" for x in shares)
    assert f"takes it from {before} of {results['asked']} questions" in " ".join(
        text.split()
    )
    assert f"to {after}, and its 4-bit copy to {four}:" in text
    times = results["times"]["15 M parameters, 4 bits"]
    for name in ("token_ms", "prefill_ms"):
        ratio = times["beside"][name] / times["without"][name]
        assert f"{ratio:.2f} times" in text


def test_every_link_leads_somewhere():
    for path in ROOT.glob("**/*.md"):
        if {"node_modules", "build", ".venv"} & set(path.relative_to(ROOT).parts):
            continue
        text = re.sub(r"```.*?```|^    .*?$", "", path.read_text(), flags=re.S | re.M)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            if not re.match(r"https?:|mailto:", link):
                assert (path.parent / link).exists(), f"{path}: {link}"
