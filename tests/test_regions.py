"""Places in pictures become the text and the points that Ferret's code makes of them."""

import io

import numpy as np
import pytest
from PIL import Image

from mm1_mlx.errors import PromptError
from mm1_mlx.messages import Region
from mm1_mlx.prompt import Prompt
from mm1_mlx.regions import draw_points, locate, read_mask, spell
from mm1_mlx.shots import Shot, with_shots
from mm1_mlx.tokenizer import load_tokenizer

SIZE = (640, 480)
SAMPLER = {
    "input_size": 32,
    "output_size": 48,
    "num_points": 40,
    "num_sub_points": [12, 5],
    "num_neighbours": 4,
}


def place_of(kind, shape, size=SIZE):
    return locate(Region(kind, shape, 0), size)


def pixels_of(place):
    """Every pixel (x, y) of a place."""
    rows, columns = np.nonzero(place.mask)
    left, top = place.origin
    return set(zip((columns + left).tolist(), (rows + top).tolist(), strict=True))


def upstream(coordinates, size, mask=None):
    """Pixels as ``generate_mask_for_feature`` marks them, x first."""
    marked = np.zeros(size)
    if len(coordinates) == 2:
        (x, y), (width, height) = coordinates, size
        columns = slice(int(max(0, x - 5)), int(min(width, x + 6)))
        marked[columns, int(max(0, y - 5)) : int(min(height, y + 6))] = 1
    else:
        x1, y1, x2, y2 = coordinates
        marked[x1 : x2 + 1, y1 : y2 + 1] = 1
    if mask is not None:
        marked = marked * mask.T
    return set(zip(*(i.tolist() for i in np.nonzero(marked)), strict=True))


# Coordinates


def test_a_box_is_spelled_as_if_the_picture_were_1000_wide_and_high():
    assert spell((100, 50, 300, 200), SIZE, 1000) == "[156, 104, 468, 416]"
    assert spell((0, 0, 640, 480), SIZE, 1000) == "[0, 0, 1000, 1000]"
    assert spell((639.5, 3.25), SIZE, 1000) == "[999, 6]"
    assert spell((320, 240), SIZE, 100) == "[50, 50]"


# Value, side, and what ferret/eval/model_lvis.py makes of them with its ratio; divided
# last, each would be one more.
@pytest.mark.parametrize(
    ("value", "side", "number"), [(19, 19, 999), (19, 38, 499), (19, 76, 249)]
)
def test_numbers_are_rounded_as_ferret_rounds_them(value, side, number):
    assert spell((value, 0), (side, 9), 1000) == f"[{number}, 0]"
    assert spell((0, 0, 0, value), (9, side), 1000) == f"[0, 0, 0, {number}]"


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("box", [100, 50, 300, 200]),
        ("box", [5, 6, 5, 6]),
        ("box", [0, 0, 640, 480]),
        ("point", [320, 240]),
        ("point", [2, 479]),
        ("point", [639, 0]),
        ("point", [10.5, 20.5]),
    ],
)
def test_pixels_are_those_that_ferret_marks(kind, shape):
    place = place_of(kind, shape)
    assert pixels_of(place) == upstream(shape, SIZE)
    assert place.coordinates == tuple(shape)


def test_a_point_is_a_window_of_11_by_11():
    assert place_of("point", [320, 240]).mask.shape == (11, 11)


def test_a_mask_is_a_free_form_within_its_box():
    mask = np.zeros((48, 64), bool)
    mask[10:20, 30:33] = mask[19, 5:40] = True
    place = place_of("mask", mask, (64, 48))
    assert place.coordinates == (5, 10, 39, 19)
    assert pixels_of(place) == upstream([5, 10, 39, 19], (64, 48), mask)


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("box", [0, 0, 641, 10], r"box \[0, 0, 641, 10\] is not inside picture 1, whi"),
        (
            "box",
            [-1, 0, 5, 10],
            "is not inside picture 1, which has 640 x 480 pix",
        ),
        ("box", [640, 0, 640, 10], "is not inside picture 1"),
        (
            "box",
            [9, 0, 5, 10],
            r"box \[9, 0, 5, 10\] of picture 1 is reversed, exp",
        ),
        (
            "box",
            [1, 2, 3],
            r"box of picture 1 is \[1, 2, 3\], expected \[x1, y1, x2, y",
        ),
        ("box", "1,2,3,4", "box of picture 1 is '1,2,3,4', expected"),
        ("box", [1, 2, 3, float("nan")], "expected .* in its pixels"),
        ("box", [10**400, 0, 1, 1], "box of picture 1 has a number that no float hol"),
        ("point", [1, -(10**5000)], r"that no float holds, expected \[x, y\] in its p"),
        ("point", [640, 3], r"point \[640, 3\] is not inside picture 1"),
        ("point", [1, 2, 3, 4], r"point of picture 1 is .*, expected \[x, y\]"),
        ("mask", np.zeros((480, 640)), "mask of picture 1 is empty; paint the region"),
        (
            "mask",
            np.ones((480, 600)),
            "has 600 x 480 pixels, expected its 640 x 480; re",
        ),
        (
            "mask",
            np.ones((480, 640, 3)),
            r"an array of shape \(480, 640, 3\), expected",
        ),
        ("mask", 7, "mask of picture 1 is of type int, expected a path"),
        ("mask", b"not a picture", "mask of picture 1 is not a PNG, .* picture"),
        (
            "mask",
            "/nowhere/m.png",
            "mask '/nowhere/m.png' was not found; give the path",
        ),
    ],
)
def test_places_that_are_none_are_named(kind, shape, message):
    with pytest.raises(PromptError, match=message):
        place_of(kind, shape)


# Masks as pictures


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


MARKED = np.zeros((20, 30), bool)
MARKED[4:9, 10:25] = True
GREY = Image.fromarray((MARKED * 255).astype(np.uint8))


def painted():
    """White strokes on nothing."""
    image = Image.new("RGBA", (30, 20), (255, 255, 255, 0))
    image.paste("white", mask=GREY)
    return image


@pytest.mark.parametrize(
    "mask",
    [
        MARKED,
        MARKED.astype(np.uint8) * 3,
        GREY,
        GREY.convert("1"),
        GREY.convert("RGB"),
        GREY.convert("P"),
        Image.fromarray(MARKED.astype(np.uint8)),
        Image.fromarray(MARKED.astype(np.uint16) * 60_000),
        painted(),
        # Premultiplied, which Pillow converts to little else.
        Image.merge("LA", (Image.new("L", (30, 20), 255), GREY)).convert("La"),
        encoded(GREY),
        encoded(GREY.resize((30, 20)), "JPEG"),
    ],
    ids=lambda _: "mask",
)
def test_masks_come_in_many_forms(mask):
    assert np.array_equal(read_mask(mask, (30, 20), "picture 1"), MARKED)


# How a camera turns what it stores, by EXIF's orientation.
TURNS = {
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "I;16"])
def test_a_mask_is_turned_upright_as_its_picture_is(orientation, mode):
    mask = GREY.convert(mode)
    if mode == "I;16":
        mask = Image.fromarray(MARKED.astype(np.uint16) * 60_000)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    mask.transpose(TURNS[orientation]).save(buffer, "PNG", exif=exif)
    stored = buffer.getvalue()
    assert np.array_equal(read_mask(stored, (30, 20), "picture 1"), MARKED)
    if orientation != 3:
        # Of the picture's size only as it is stored.
        with pytest.raises(
            PromptError, match="has 30 x 20 pixels, expected its 20 x 3"
        ):
            read_mask(stored, (20, 30), "picture 1")


def test_a_mask_that_lies_on_its_side_is_refused():
    with pytest.raises(PromptError, match="has 30 x 20 pixels, expected its 20 x 30"):
        read_mask(encoded(GREY), (20, 30), "picture 1")


@pytest.mark.parametrize(
    ("dtype", "white"), [(bool, 1), (np.uint8, 255), (np.uint16, 60_000)]
)
def test_transparent_white_of_a_grey_mask_is_no_region(dtype, white):
    samples = np.zeros((20, 30), np.uint16)
    samples[:2] = white
    grey = Image.fromarray(samples.astype(dtype))
    buffer = io.BytesIO()
    grey.save(buffer, "PNG", transparency=white)
    assert not read_mask(buffer.getvalue(), (30, 20), "picture 1").any()
    # Less bright, and there.
    if dtype is not bool:
        samples[4:9, 10:25] = white - 55
        buffer = io.BytesIO()
        Image.fromarray(samples.astype(dtype)).save(buffer, "PNG", transparency=white)
        mask = read_mask(buffer.getvalue(), (30, 20), "picture 1")
        assert np.array_equal(mask, MARKED)


def test_a_large_mask_is_refused_by_its_header(tmp_path):
    path = tmp_path / "mask.png"
    path.write_bytes(encoded(GREY)[:60])
    # Cut short, which decoding would have found.
    with pytest.raises(PromptError, match="mask of picture 2 has 30 x 20 pixels, exp"):
        read_mask(path, (31, 20), "picture 2")
    with pytest.raises(PromptError, match=r"mask '.*mask.png' is damaged or cut short"):
        read_mask(path, (30, 20), "picture 2")


# Points


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("box", [100, 50, 300, 200]),
        ("box", [0, 0, 511, 99]),  # a stretch is as long as a row
        ("box", [3, 0, 258, 255]),
        ("point", [320, 240]),
        ("box", [7, 9, 7, 9]),
    ],
)
def test_points_are_evenly_spread_over_their_pixels(kind, shape):
    place = place_of(kind, shape)
    points = draw_points(place, SIZE, 512)
    assert points.shape == (512, 2)
    assert points.dtype == np.float32
    pixels = np.rint(points * SIZE).astype(int)
    assert set(map(tuple, pixels.tolist())) <= pixels_of(place)
    height, width = place.mask.shape
    if width * height <= 512:
        _, times = np.unique(pixels, axis=0, return_counts=True)
        assert len(times) == width * height
        assert times.max() - times.min() <= 1
        return
    # As many points in each of 16 fields as it has pixels, to a few.
    x = (pixels[:, 0] - place.origin[0]) * 4 // width
    y = (pixels[:, 1] - place.origin[1]) * 4 // height
    fields = np.bincount(4 * y + x, minlength=16)
    assert np.abs(fields - 32).max() <= 9


def test_points_are_the_same_every_time_and_inside_a_mask():
    mask = np.zeros((480, 640), bool)
    mask[10:200, 30:34] = mask[190:200, 5:400] = True
    place = place_of("mask", mask)
    points = draw_points(place, SIZE, 512)
    assert np.array_equal(points, draw_points(place, SIZE, 512))
    columns, rows = np.rint(points * SIZE).astype(int).T
    assert mask[rows, columns].all()
    assert len({*zip(columns, rows, strict=True)}) == 512


# In prompts


@pytest.fixture
def build(make_config, any_folder):
    """A function: the prompt of messages, for a model with or without a sampler."""

    def build(messages, images=(), *, sampler=True, **prompt):
        config = make_config(
            prompt={"template": "plain"} | prompt, region=SAMPLER if sampler else None
        )
        tokenizer = load_tokenizer(any_folder, config.prompt, regions=sampler)
        return Prompt.build(messages, images, config, tokenizer), tokenizer

    return build


def user(*content):
    return {"role": "user", "content": [text(c) for c in content]}


def text(content):
    return {"type": "text", "text": content} if isinstance(content, str) else content


def image(size=(20, 10)):
    return {"type": "image", "image": Image.new("RGB", size, "red")}


def region(**fields):
    return {"type": "region"} | fields


def decode(tokenizer, prompt):
    """The text, with <P> for pictures and <R> for regions."""
    pieces, position = [], 0
    for span in prompt.spans:
        pieces.append(prompt.tokens[position : span.start])
        position = span.stop
    pieces.append(prompt.tokens[position:])
    words = [
        tokenizer.hf.decode(list(piece), skip_special_tokens=False) for piece in pieces
    ]
    marks = ["<R>" if s.kind == "region" else "<P>" for s in prompt.spans] + [""]
    return "".join(w + m for w, m in zip(words, marks, strict=True))


def test_a_region_is_its_coordinates_and_a_token_behind_its_picture_s(build):
    prompt, tokenizer = build(
        [user(image(), "is it ", region(box=[2, 1, 10, 5]), " red")]
    )
    written = decode(tokenizer, prompt).replace("<s>", "").replace("<P> ", "<P>")
    assert written.split("<P>")[1].startswith("is it [100, 100, 500, 500] <R>")
    picture, place = prompt.spans
    assert (place.kind, place.length, place.picture) == ("region", 1, 0)
    assert place.offset == picture.length == 4
    assert prompt.tokens[place.start] == 2
    assert prompt.num_image_tokens == 5
    (points,) = prompt.pictures[0].regions
    assert points.shape == (40, 2)
    assert place.digest != picture.digest


def test_a_model_without_a_sampler_reads_the_coordinates_alone(build):
    prompt, tokenizer = build(
        [user(image(), "is ", region(point=[3, 4]), "?")], sampler=False
    )
    assert decode(tokenizer, prompt).endswith("is [150, 400]?")
    assert len(prompt.spans) == 1
    assert prompt.pictures[0].regions == ()


def test_regions_of_several_pictures_find_theirs(build):
    content = [
        *(image(), region(point=[1, 1]), image((40, 40))),
        *(region(point=[1, 1]), region(point=[10, 5], picture=0)),
        region(box=[0, 0, 5, 5]),
    ]
    prompt, _ = build([user(*content)])
    regions = [s for s in prompt.spans if s.kind == "region"]
    assert [(s.picture, s.offset) for s in regions] == [(0, 4), (1, 4), (0, 5), (1, 5)]
    assert [len(p.regions) for p in prompt.pictures] == [2, 2]


def test_pictures_given_beside_the_messages_come_before_their_regions(build):
    prompt, _ = build([user("a ", region(point=[1, 1]))], [image()["image"]])
    assert [s.kind for s in prompt.spans] == ["picture", "region"]


def test_a_prompt_with_regions_is_answered(build, make_model):
    prompt, _ = build([user(image(), region(box=[2, 1, 10, 5]), region(point=[3, 3]))])
    model = make_model(region=SAMPLER)
    import mlx.core as mx

    (tokens,) = model.encode(prompt.pictures)
    assert tokens.shape == (6, 48)
    embeddings = model.embed(mx.array(prompt.tokens), [tokens], prompt.spans)
    starts = [span.start for span in prompt.spans[1:]]
    assert mx.array_equal(embeddings[mx.array(starts)], tokens[4:])


@pytest.mark.parametrize("template", ["plain", "llava", "ferret", "ferret_gemma"])
def test_a_typed_region_token_is_text(template, build):
    typed = "<region_fea>" * 50
    messages = [user(image(), region(point=[1, 1]), typed)]
    prompt, tokenizer = build(messages, template=template)
    assert sum(s.kind == "region" for s in prompt.spans) == 1
    assert tokenizer.region_id not in prompt.tokens
    assert typed in decode(tokenizer, prompt).replace(" <region", "<region")


def test_a_typed_region_token_over_several_parts_is_text(build):
    prompt, tokenizer = build([user("<region", "_fea>")])
    assert tokenizer.region_id not in prompt.tokens
    assert prompt.spans == ()


def test_a_checkpoint_s_template_takes_a_region_in_its_text(build, any_folder):
    template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>{% else %}({{ c['text'] | trim }}){% endif %}"
        "{% endfor %}{% endfor %}"
    )
    (any_folder / "chat_template.jinja").write_text(template)
    try:
        messages = [user(image(), "is ", region(point=[3, 4]), " red")]
        prompt, tokenizer = build(messages, template="checkpoint", content="parts")
    finally:
        (any_folder / "chat_template.jinja").unlink()
    written = decode(tokenizer, prompt).split("<P>")[1]
    assert written.replace(" ", "") == "(is[150,400]<R>red)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [region(box=[1, 1, 2, 2])],
            "a box refers to the latest picture before it,",
        ),
        ([region(point=[1, 1]), image()], "but there is none; put the picture first"),
        (
            [image(), region(point=[1, 1], picture=1)],
            "refers to picture 1, counted f",
        ),
        (
            [image(), region(point=[1, 1], picture=-1)],
            "the prompt has 1 pictures; give",
        ),
        (
            [image(), region(point=[1, 1], picture="a")],
            "refers to picture 'a', counted",
        ),
        ([image(), region()], "a region has no shape, expected one of"),
        (
            [image(), region(point=[1, 1], box=[1, 1, 2, 2])],
            r"\['box', 'point'\], exp",
        ),
        (
            [image(), region(point=[20, 1])],
            r"point \[20, 1\] is not inside picture 1, w",
        ),
    ],
)
def test_regions_of_no_picture_are_named(content, message, build):
    with pytest.raises(PromptError, match=message):
        build([user(*content)])


@pytest.mark.parametrize("style", ["chat", "vqa"])
def test_regions_behind_shots_go_on_meaning_their_pictures(style, build):
    shot = Shot((Image.new("RGB", (8, 8)), Image.new("RGB", (9, 9))), "yes", "red?")
    content = [
        *(image(), "is ", region(point=[1, 1], picture=0), " or "),
        *(image((40, 40)), region(point=[30, 3], picture=1), "?"),
    ]
    messages = with_shots([shot], [user(*content)], [], style)
    prompt, _ = build(messages)
    regions = [s.picture for s in prompt.spans if s.kind == "region"]
    assert regions == [2, 3]
