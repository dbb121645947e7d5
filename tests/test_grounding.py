"""Boxes are found in text as Ferret writes them, and drawn where they are."""

import io
import time

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
        ("a dog [1, 2, 3, 4]; and, or [5, 6, 7, 8]", ["a dog", "a dog"]),
        ("a dog [1, 2, 3, 4] , and or, a cat [5, 6, 7, 8]", ["a dog", "a cat"]),
        ("and, or [1, 2, 3, 4] and orange [5, 6, 7, 8]", ["", "orange"]),
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


@pytest.mark.parametrize("joins", [" ", ", ", "and "])
def test_long_stretches_between_boxes_take_no_time(joins):
    between = joins * 100_000
    start = time.perf_counter()
    labels = [label for label, _ in found(f"a [1, 2, 3, 4]{between}x [5, 6, 7, 8]")]
    assert time.perf_counter() - start < 1
    assert labels == ["a", "x"]


# Value, side, and what ``resize_bbox`` of ferret/eval/model_refcoco.py makes of them;
# multiplied before it is divided, each would be one more.
@pytest.mark.parametrize(
    ("value", "side", "pixel"), [(750, 36, 26), (375, 72, 26), (875, 72, 62)]
)
def test_pixels_are_rounded_as_ferret_rounds_them(value, side, pixel):
    text = f"x [{value}, 0, {value}, 0] y [0, {value}, 0, {value}]"
    assert found(text, (side, side)) == [
        ("x", (pixel, 0, pixel, 0)),
        ("y", (0, pixel, 0, pixel)),
    ]


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
    label = "a label longer than forty characters, of words ☃"
    width, height = size
    places = [
        (0, 0, width, height),
        (width, 0, width, height),
        (0, height, width, height),
        (width, height, width, height),
        (0, 0, 0, 0),
    ]
    page = Image.new("RGB", size, "white")
    for text in ("", label):
        for place in places:
            drawn = draw_boxes(page, [Box(text, place)])
            assert drawn.size == size
            assert np.asarray(drawn).min() < 255
    assert draw_boxes(page, [Box(label, place) for place in places]).size == size


def test_whatever_box_a_text_names_is_drawn():
    rng = np.random.default_rng(0)
    edges = [-5, 0, 1, 999, 1000, 1001, 99_999]
    count = 0
    for _ in range(400):
        size = tuple(int(x) for x in rng.choice([1, 2, 3, 7, 40, 333], 2))
        numbers = np.where(
            rng.random(4) < 0.5, rng.choice(edges, 4), rng.integers(-50, 1100, 4)
        )
        x1, y1, x2, y2 = numbers.tolist()
        label = "".join(map(chr, rng.integers(32, 0x3000, rng.integers(60))))
        box = [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]
        boxes = parse_boxes(f"{label} {box}", size)
        drawn = draw_boxes(Image.new("RGB", size, "white"), boxes)
        assert drawn.size == size
        assert (np.asarray(drawn).min() < 255) == bool(boxes)
        count += len(boxes)
    assert count > 200


@pytest.mark.parametrize(
    ("numbers", "pixels"),
    [
        ("[1000, 0, 1000, 500]", [(39, 0), (39, 10)]),
        ("[0, 1000, 250, 1000]", [(0, 19), (10, 19)]),
        ("[1000, 1000, 1000, 1000]", [(39, 19)]),
    ],
)
def test_a_box_past_the_last_pixels_is_drawn_on_them(numbers, pixels):
    page = Image.new("RGB", (40, 20), "white")
    drawn = draw_boxes(page, parse_boxes(numbers, page.size))
    rows, columns = np.nonzero(np.asarray(drawn)[..., 1] < 255)
    marked = set(zip(columns.tolist(), rows.tolist(), strict=True))
    (left, top), (right, bottom) = pixels[0], pixels[-1]
    assert marked == {
        (x, y) for x in range(left, right + 1) for y in range(top, bottom + 1)
    }


def test_a_picture_is_upright_before_boxes_are_counted(tmp_path):
    image = Image.new("RGB", (30, 20), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_upright(tmp_path / "turned.jpg").size == (20, 30)


def profile_in(space):
    """An ICC profile's header, which is what names the space of its colours."""
    return bytes(16) + space + bytes(108)


@pytest.mark.parametrize(
    ("mode", "kind", "space", "kept"),
    [
        ("CMYK", "JPEG", b"CMYK", False),
        ("L", "PNG", b"GRAY", False),
        ("L", "JPEG", b"GRAY", False),
        ("RGB", "PNG", b"RGB ", True),
        ("RGB", "JPEG", b"RGB ", True),
        ("P", "PNG", b"RGB ", True),
        ("RGB", "PNG", b"", False),
    ],
)
def test_a_profile_of_other_colours_is_not_drawn_along(
    mode, kind, space, kept, tmp_path
):
    buffer = io.BytesIO()
    profile = profile_in(space)
    Image.new(mode, (8, 8)).save(buffer, kind, icc_profile=profile)
    source = Image.open(buffer)
    assert source.info["icc_profile"] == profile
    save_drawing(draw_boxes(load_upright(source), []), tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert image.info.get("icc_profile") == (profile if kept else None)
    # What was given stays as it was.
    assert source.info["icc_profile"] == profile


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg", ".webp"])
def test_the_suffix_is_the_format(suffix, tmp_path):
    path = tmp_path / f"out{suffix}"
    for colour in ("red", "blue"):
        save_drawing(Image.new("RGB", (8, 8), colour), path)
    with Image.open(path) as image:
        assert image.format == {".png": "PNG", ".webp": "WEBP"}.get(suffix, "JPEG")
        assert image.convert("RGB").getpixel((4, 4))[2] > 200
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [(16_384, 2), (2, 16_384)])
def test_a_picture_too_long_for_webp_is_refused(size, tmp_path):
    page = Image.new("RGB", size, "white")
    with pytest.raises(PromptError, match="but a WebP file holds at most 16383 a side"):
        save_drawing(page, tmp_path / "out.WebP")
    assert list(tmp_path.iterdir()) == []
    for suffix in ("png", "jpg"):
        save_drawing(page, tmp_path / f"out.{suffix}")
    save_drawing(page.crop((0, 0, 2, 2)).resize((16_383, 1)), tmp_path / "out.webp")


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
