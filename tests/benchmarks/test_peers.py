"""What a comparison says is what was measured, whoever goes first."""

import re
import shutil

import pytest
from jinja2 import Template

from benchmarks.peers import compare, fixture
from benchmarks.peers.machine import PACKAGE, ROOT, check_installed, commit, digest
from benchmarks.peers.rows import Row, interleave, lower_bound, table


@pytest.mark.parametrize(
    ("better", "ratios"), [("higher", [2.0, 0.5]), ("lower", [0.5, 2.0])]
)
def test_above_one_is_better_whatever_is_measured(better, ratios):
    row = Row("row", better, "s", [4.0, 2.0], [2.0, 4.0])
    assert row.ratios == ratios


def test_a_ratio_is_the_median_of_rounds_not_the_ratio_of_medians():
    row = Row("row", "higher", "s", [1.0, 2.0, 9.0], [1.0, 4.0, 3.0])
    assert row.to_dict()["ratio"] == 1.0
    assert row.to_dict()["ours"] == {"median": 2.0, "min": 1.0, "max": 9.0}


def test_a_round_is_a_pair_and_the_first_one_warms_up():
    asked = []

    def measure(side):
        return lambda i: asked.append((side, i)) or float(10 * i + len(side))

    row = interleave(4, Row("row", "lower", "s"), measure("ours"), measure("peer"))
    assert [i for _, i in asked] == [-1, -1, 0, 0, 1, 1, 2, 2, 3, 3]
    # Each goes first every other time.
    assert [side for side, _ in asked[2::2]] == ["peer", "ours", "peer", "ours"]
    assert row.ours == row.peer == [4.0, 14.0, 24.0, 34.0]


def test_the_bound_lies_below_the_median_as_far_as_rounds_differ():
    assert lower_bound([1.5] * 7) == 1.5
    ratios = [0.9, 1.0, 1.0, 1.1, 1.1, 1.2, 1.3]
    assert lower_bound(ratios) == pytest.approx(1.0)
    # A median of 5 resampled rounds is the least of them in 4.2% of draws (binomial).
    assert lower_bound([1.0, 2.0, 3.0, 4.0, 5.0]) == 1.0


def test_a_table_says_megabytes_and_every_row():
    row = Row("memory", "lower", "bytes", [5e8], [1e9], "one reading")
    line = table([row.to_dict()]).splitlines()[-1]
    assert line == "| memory | 500 MB | 1000 MB | 2.00 |  | one reading |"


def test_equal_tokens_are_counted_from_the_first():
    assert compare._equal([1, 2, 3], [1, 2, 3]) == "first 3 of 3 tokens equal"
    assert compare._equal([1, 2, 3], [1, 5, 3]) == "first 1 of 3 tokens equal"
    assert compare._equal([1, 2, 3], [1, 2]) == "first 2 of 3 tokens equal"


def test_other_code_than_the_checkouts_is_noticed(tmp_path, monkeypatch):
    folders = {name: ROOT / path for name, path in PACKAGE.items()}
    installed = tmp_path / "mm1_mlx"
    for name, folder in folders.items():
        shutil.copytree(folder, installed / name, dirs_exist_ok=True)
    assert digest({"": installed}) == digest(folders)
    monkeypatch.setattr("benchmarks.peers.machine._ask", lambda *_: f"{installed}\n")
    check_installed("python")
    with (installed / "apps" / "cli.py").open("a") as file:
        file.write("#")
    with pytest.raises(SystemExit, match="install it again"):
        check_installed("python")


def test_a_commit_has_a_name():
    assert re.fullmatch(r"[0-9a-f]{12,}(-dirty)?", commit())


def test_a_row_of_training_has_as_many_positions_as_is_counted():
    """But for the space with which the template ends, where ours has the end token."""
    text = " ".join(str(300 + j % 200) for j in range(1000))
    told = {"type": "text", "text": compare.answered(text)}
    asked = [{"type": "image"}, {"type": "text", "text": compare.QUESTION}]
    turns = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": [told]},
    ]
    row = Template(fixture.TEMPLATE).render(messages=turns)
    tokens = fixture.tokenizer().encode(row).tokens
    picture = (fixture.IMAGE // fixture.PATCH) ** 2
    assert tokens.count("<image>") == 1
    assert len(tokens) - 1 + picture == compare.LEARNED["vlm"][2]
