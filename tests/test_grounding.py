"""Boxes are found in text as Ferret writes them, and drawn where they are."""

import numpy as np
import pytest
from PIL import Image

from mm1_mlx.errors import PromptError
from mm1_mlx.grounding import (
    COLOURS,
    Box,
    check_drawing,
    draw_boxes,
    load_upright,
    parse_boxes,
    save_drawing,
)
from mm1_mlx.regions import spell

SIZE = (640, 480)


def found(text, size=(1000, 1000), **options):
    return [(box.label, box.box) for box in parse_boxes(text, size, **options)]


def test_boxes_come_back_in_pixels_as_ferret_computes_them():
    text = "the dog [156, 104, 468, 416]"
    assert found(text, SIZE) == [("the dog", (99, 49, 299, 199))]
    spelled = spell((100, 50, 300, 200), SIZE, 1000)
    assert spelled in text
    assert found("x [50, 50, 100, 100]", SIZE, coordinate_range=100) == [
        ("x", (320, 240, 640, 480))
    ]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("A man [1, 2, 3, 4] in a hat [5, 6, 7, 8].", ["A man", "in a hat"]),
        ("two dogs [1, 2, 3, 4] [5, 6, 7, 8]", ["two dogs", "two dogs"]),
        ("two dogs [1, 2, 3, 4], [5, 6, 7, 8]", ["two dogs", "two dogs"]),
        ("dogs [1, 2, 3, 4] and [5, 6, 7, 8]", ["dogs", "dogs"]),
        ("a dog [1, 2, 3, 4] and a cat [5, 6, 7, 8]", ["a dog", "a cat"]),
        ("It rains. a cat [1, 2, 3, 4]", ["a cat"]),
        ("Yes:\n- a cat: [1, 2, 3, 4]\n- a dog: [5, 6, 7, 8]", ["a cat", "a dog"]),
        ("boat [1, 2, 3, 4] . car [5, 6, 7, 8] .", ["boat", "car"]),
        ("[1, 2, 3, 4]", [""]),
        ("[1,2,3,4] , [ 5 , 6 , 7 , 8 ]", ["", ""]),
        ("a 3.5 m boat [1, 2, 3, 4]", ["a 3.5 m boat"]),
        ("android [1, 2, 3, 4]", ["android"]),
        ("nothing [1, 2] [1, 2, 3] [a, b, c, d] [1, 2, 3, 4, 5] (1, 2, 3, 4)", []),
        ("shares [0.1, 0.2, 0.3, 0.4]", []),
        (f"[{'9' * 5000}, 2, 3, 4]", []),
    ],
)
def test_a_label_is_the_phrase_before_its_box(text, labels):
    assert [label for label, _ in found(text)] == labels


@pytest.mark.parametrize(
    ("numbers", "box"),
    [
        ("[0, 0, 1000, 1000]", (0, 0, 640, 480)),
        ("[-5, 10, 2000, 20]", (0, 4, 640, 9)),
        ("[5, 5, 5, 5]", (3, 2, 3, 2)),
        ("[500, 5, 499, 6]", None),
        ("[5, 500, 6, 499]", None),
        ("[1001, 5, 1002, 6]", None),
        ("[-9, 5, -1, 6]", None),
    ],
)
def test_boxes_past_the_picture_are_clipped_and_others_left_out(numbers, box):
    expected = [] if box is None else [("x", box)]
    assert found(f"x {numbers}", SIZE) == expected


def test_a_box_that_is_left_out_takes_no_label_along():
    assert found("a [9, 1, 1, 9] [1, 2, 3, 4] b [5, 6, 7, 8]") == [
        ("a", (1, 2, 3, 4)),
        ("b", (5, 6, 7, 8)),
    ]


def test_boxes_are_drawn_where_they_are_and_labels_in_their_colours():
    page = Image.new("RGB", SIZE, "white")
    boxes = [
        Box("one", (100, 100, 200, 180)),
        Box("two", (300, 200, 500, 400)),
        Box("one", (10, 300, 90, 479)),
    ]
    drawn = draw_boxes(page, boxes)
    assert np.asarray(page).min() == 255  # the picture itself stays
    pixel = {name: Image.new("RGB", (1, 1), name).getpixel((0, 0)) for name in COLOURS}
    first, second = (pixel[name] for name in COLOURS[:2])
    assert drawn.getpixel((200, 140)) == first
    assert drawn.getpixel((400, 400)) == second
    assert drawn.getpixel((90, 400)) == first
    assert drawn.getpixel((150, 140)) == (255, 255, 255)
    # The plate of a label lies above its box, with white letters on it.
    plate = np.asarray(drawn)[80:100, 100:130]
    assert (plate == first).all(-1).mean() > 0.3
    assert (plate == 255).all(-1).any()


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (2000, 8)])
def test_any_size_of_picture_and_any_label_is_drawn(size):
    box = Box("a label longer than forty characters, of words ☃", (0, 0, *size))
    drawn = draw_boxes(Image.new("RGB", size, "white"), [box, Box("", (0, 0, 0, 0))])
    assert drawn.size == size
    assert np.asarray(drawn).min() < 255


def test_a_picture_is_upright_before_boxes_are_counted(tmp_path):
    image = Image.new("RGB", (30, 20), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_upright(tmp_path / "turned.jpg").size == (20, 30)


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg", ".webp"])
def test_the_suffix_is_the_format(suffix, tmp_path):
    path = tmp_path / f"out{suffix}"
    for colour in ("red", "blue"):
        save_drawing(Image.new("RGB", (8, 8), colour), path)
    with Image.open(path) as image:
        assert image.format == {".png": "PNG", ".webp": "WEBP"}.get(suffix, "JPEG")
        assert image.convert("RGB").getpixel((4, 4))[2] > 200
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_drawing_leaves_what_was_there(tmp_path):
    path = tmp_path / "out.jpg"
    save_drawing(Image.new("RGB", (8, 8), "red"), path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="cannot write mode RGBA as JPEG"):
        save_drawing(Image.new("RGBA", (8, 8)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.tiff", "ends with '.tiff', expected one of"),
        ("out", "ends with '', expected one of"),
        ("none/out.png", "lies in a folder that is not there; name a picture file"),
        ("folder.png", "is a folder; name a picture file"),
    ],
)
def test_places_where_nothing_can_be_drawn_are_named(name, message, tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(PromptError, match=message):
        check_drawing(tmp_path / name)
