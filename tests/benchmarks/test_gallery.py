"""The gallery's table: what is shown of a case, and which cases are."""

import pytest
from PIL import Image

from benchmarks.shapes import gallery
from benchmarks.shapes.cases import Case
from benchmarks.shapes.gallery import (
    MARK,
    SMALL,
    WHOLE,
    Answered,
    choose,
    picture,
    table,
    write,
)
from benchmarks.shapes.tables import filled

RED, BLUE = (Image.new("RGB", (96, 72), colour) for colour in ("red", "blue"))


def case(kind, **given):
    given = {"pictures": (RED,), "expected": "yes"} | given
    return Case(kind, question="Really?", **given)


@pytest.fixture
def found(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "FOLDER", tmp_path / "gallery")
    found = {kind: [] for _, kind, _ in gallery.KINDS}
    found["count"] = [Answered(case("count"), said) for said in ("no", "yes", "well")]
    return found


def test_the_first_right_and_the_first_wrong_one_are_shown(found):
    assert [(name, shown.answer) for name, _, shown in choose(found)] == [
        ("count-right.png", "yes"),
        ("count-wrong.png", "no"),
    ]


def test_what_is_wrong_is_said_to_be(found):
    right, wrong = table(write(found), "x").splitlines()[2:]
    assert right.endswith("| Really? | **yes** |")
    assert wrong.endswith("| Really? | no (wrong: yes) |")
    for row, name in ((right, "count-right"), (wrong, "count-wrong")):
        assert f"(x/{name}.png)" in row
        with Image.open(gallery.FOLDER / f"{name}.png") as shown:
            assert shown.size == (192, 144)


def test_pictures_of_an_earlier_gallery_are_not_left(found):
    write(found)
    found["count"] = found["count"][:1]
    write(found)
    assert [path.name for path in gallery.FOLDER.iterdir()] == ["count-wrong.png"]


def test_examples_stand_above_what_is_asked(found):
    shown = Answered(case("count", shots=((BLUE, "dax"), (RED, "wug"))), "dax")
    whole = picture(shown)
    assert whole.getpixel((10, 10)) == (0, 0, 255)
    assert whole.getpixel((10, whole.height - 10)) == (255, 0, 0)
    found["count"] = [shown]
    assert "| (dax, wug) Really? | dax (wrong: yes) |" in table(write(found), "x")


def test_earlier_turns_are_shown_with_their_pictures(found):
    before = (((BLUE,), "What colour is it?", "blue"), ((), "Sure?", "yes"))
    shown = Answered(case("count", before=before), "yes")
    whole = picture(shown)
    assert whole.getpixel((10, 10)) == (0, 0, 255)
    assert whole.getpixel((whole.width - 10, 10)) == (255, 0, 0)
    found["count"] = [shown]
    asked = "| What colour is it? blue<br>Sure? yes<br>Really? | **yes** |"
    assert asked in table(write(found), "x")


def test_small_writing_is_shown_as_it_was_read_both_ways(found):
    found["count"] = []
    found[WHOLE] = [Answered(case(WHOLE), said) for said in ("a", "b")]
    found[SMALL] = [Answered(case(SMALL), said) for said in ("no", "yes")]
    (_, right, (_, _, said)), (_, wrong, _) = write(found)
    assert said == "as one picture: b<br>with four parts: **yes**"
    assert [right, wrong] == [
        f"read-small-with-parts-{x}.png" for x in ("right", "wrong")
    ]


@pytest.mark.parametrize("path", [gallery.README, gallery.PROJECT])
def test_the_galleries_place_is_there(path):
    text = path.read_text()
    assert "\n<!-- gallery -->\nX\n<!-- /gallery -->\n" in filled(text, MARK, "X")
    with pytest.raises(ValueError, match="<!-- galery --> with <!-- /galery -->"):
        filled(text, "galery", "X")
