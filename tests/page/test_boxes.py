"""Boxes are read as mm1_mlx/grounding.py reads them, and lie where they say."""

import pytest
from driver import SHAPES, STAR
from PIL import Image
from playwright.sync_api import expect

from mm1_mlx.grounding import parse_boxes

TEXTS = [
    "the dog [156, 104, 468, 416]",
    "A man [1, 2, 3, 4] in a hat [5, 6, 7, 8].",
    "two dogs [1, 2, 3, 4] [5, 6, 7, 8]",
    "dogs [1, 2, 3, 4] and [5, 6, 7, 8]",
    "a dog [1, 2, 3, 4] and a cat [5, 6, 7, 8]",
    "It rains. a cat [1, 2, 3, 4]",
    "Yes:\n- a cat: [1, 2, 3, 4]\n- a dog: [5, 6, 7, 8]",
    "boat [1, 2, 3, 4] . car [5, 6, 7, 8] .",
    "[1,2,3,4] , [ 5 , 6 , 7 , 8 ]",
    "a 3.5 m boat [1, 2, 3, 4]",
    "android [1, 2, 3, 4]",
    "a dog [1, 2, 3, 4]; and, or [5, 6, 7, 8]",
    "a dog [1, 2, 3, 4] , and or, a cat [5, 6, 7, 8]",
    "and, or [1, 2, 3, 4] and orange [5, 6, 7, 8]",
    "x [0, 0, 1000, 1000] y [-5, 10, 2000, 20] z [5, 5, 5, 5]",
    "a [9, 1, 1, 9] [1, 2, 3, 4] b [1001, 5, 1002, 6] c [750, 375, 875, 625]",
    "a, b & c [1, 2, 3, 4], d; e [5, 6, 7, 8]",
]
# Sides whose products with thousandths are near whole numbers.
SIZES = [(640, 480), (36, 72), (641, 357)]


@pytest.fixture(params=SIZES, ids=str)
def picture(request, tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", request.param, "white").save(path)
    return path, request.param


def test_boxes_are_read_as_the_command_reads_them(page, picture):
    path, size = picture
    page.add(path)
    for count, text in enumerate(TEXTS, start=1):
        answer = page.asked(f"say {text}", count)
        expected = [
            f"{box.label or 'box'}: {', '.join(map(str, box.box))}"
            for box in parse_boxes(text, size)
        ]
        assert expected
        rows = answer.locator("figcaption li")
        expect(rows).to_have_text(expected)


def test_boxes_lie_where_they_say_with_a_colour_for_each_label(page):
    page.add(SHAPES)
    answer = page.asked(
        "say a circle [100, 90, 400, 400], a square [500, 20, 900, 600] [0, 0, 9, 9]"
    )
    image = answer.locator("figure img").bounding_box()
    boxes = answer.locator(".box")
    expect(boxes).to_have_count(3)
    place = boxes.first.bounding_box()
    # The picture has 256 pixels a side: whole ones of it.
    for at, side, pixels in (("x", "width", (25, 77)), ("y", "height", (23, 79))):
        scale = image[side] / 256
        assert place[at] - image[at] == pytest.approx(pixels[0] * scale, abs=1)
        assert place[side] == pytest.approx(pixels[1] * scale, abs=1)
    expect(boxes.locator("span")).to_have_text(["a circle", "a square", "a square"])
    colours = boxes.evaluate_all("all => all.map(b => getComputedStyle(b).borderColor)")
    assert colours[0] != colours[1]
    assert colours[1] == colours[2]
    # A label is inside the picture, also where its box is at the top.
    for label in boxes.locator("span").all():
        assert label.bounding_box()["y"] >= image["y"]


def test_boxes_of_a_later_answer_are_in_the_picture_before_it(page):
    page.add(STAR)
    page.asked("say hello")
    expect(page.page.locator("figure")).to_have_count(0)
    answer = page.asked("say a star [0, 0, 500, 500]", count=2)
    expect(answer.locator("figure img")).to_have_attribute("alt", "red-star.png")


def test_of_several_pictures_the_answer_does_not_say_which(page):
    page.add(STAR, SHAPES)
    answer = page.asked("say a star [0, 0, 500, 500]")
    expect(answer.locator("figure")).to_have_count(0)
    expect(answer).to_contain_text("in which of the 2 pictures")


def test_without_a_picture_numbers_are_numbers(page):
    answer = page.asked("say [1, 2, 3, 4]")
    expect(answer.locator("figure")).to_have_count(0)
    expect(answer.locator(".note")).to_have_count(0)
