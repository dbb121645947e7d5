"""Messages become exactly the text their template says, with pictures in their places."""

import base64
import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from mm1_mlx.errors import ConfigError, PromptError
from mm1_mlx.messages import collect
from mm1_mlx.prompt import Prompt, place

COLOURS = ["red", "lime", "blue", "white", "black"]


def picture(colour):
    return Image.new("RGB", (20, 10), colour)


def part(colour=None):
    return (
        {"type": "image"}
        if colour is None
        else {"type": "image", "image": picture(colour)}
    )


def text(content):
    return {"type": "text", "text": content}


def user(*content):
    return {"role": "user", "content": list(content)}


def assistant(content):
    return {"role": "assistant", "content": content}


def data_uri(colour):
    buffer = io.BytesIO()
    picture(colour).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@pytest.fixture
def build(make_config, tokenizer):
    """A function: the prompt of messages and pictures, plain by default."""

    def build(messages, images=(), **prompt):
        config = make_config(prompt={"template": "plain"} | prompt)
        return Prompt.build(messages, images, config, tokenizer)

    return build


@pytest.fixture
def seen(tokenizer):
    """A function: the prompt's text, its pictures written as their colours."""

    def seen(prompt):
        pieces, position = [], 0
        for span, shown in zip(prompt.spans, prompt.pictures, strict=True):
            pieces.append(decode(tokenizer, prompt.tokens[position : span.start]))
            pieces.append(f"({colour_of(shown)})")
            assert span.digest == shown.digest
            position = span.stop
        return "".join([*pieces, decode(tokenizer, prompt.tokens[position:])])

    return seen


def decode(tokenizer, tokens):
    return tokenizer.hf.decode(list(tokens), skip_special_tokens=False)


def colour_of(shown):
    # Normalised with mean and deviation 0.5.
    levels = tuple(round(255 * (v / 2 + 0.5)) for v in shown.tiles[0][8, 8].tolist())
    return next(
        c for c in COLOURS if Image.new("RGB", (1, 1), c).getpixel((0, 0)) == levels
    )


# Pictures in their places


def test_spans_cover_exactly_the_fillers(build):
    prompt = build(
        [user(text("a"), part("red"), part("lime"), text("b"), part("blue"))]
    )
    fillers = [i for i, token in enumerate(prompt.tokens) if token == 2]
    assert fillers == [i for span in prompt.spans for i in range(span.start, span.stop)]
    assert [span.length for span in prompt.spans] == [4, 4, 4]
    assert [(s.kind, s.picture) for s in prompt.spans] == [
        ("picture", i) for i in range(3)
    ]
    assert prompt.num_image_tokens == 12
    assert sum(len(picture.tiles) for picture in prompt.pictures) == 3


@pytest.mark.parametrize(
    "content",
    [
        [part("red")],
        [part("red"), text("is it red")],
        [text("this "), part("red"), text(" and this "), part("blue")],
        [part("red"), part("blue"), part("lime"), text("which")],
        [text("a"), text("b"), part("white"), text("c")],
    ],
)
def test_pictures_stay_where_they_stand_in_the_text(content, build, seen):
    expected = "".join(p.get("text", "(picture)") for p in content)
    order = [next(c for c in COLOURS if matches(p, c)) for p in content if "image" in p]
    for colour in order:
        expected = expected.replace("(picture)", f"({colour})", 1)
    assert seen(build([user(*content)])) == expected


def matches(shown, colour):
    return shown["image"].getpixel((0, 0)) == picture(colour).getpixel((0, 0))


def test_pictures_may_stand_in_any_turn(build, seen):
    messages = [
        user(part("red"), text("one ")),
        assistant("yes "),
        user(text("and "), part("blue"), text("?")),
    ]
    assert seen(build(messages)) == "(red)one yes and (blue)?"


def test_parts_without_a_picture_take_the_given_ones_in_order(build, seen):
    messages = [user(part(), text("a"), part("blue"), part())]
    images = [picture("red"), picture("lime")]
    assert seen(build(messages, images)) == "(red)a(blue)(lime)"


def test_pictures_go_before_the_last_users_text_when_no_part_asks(build, seen):
    messages = [user(text("one ")), assistant("two "), user(text("three"))]
    images = [picture("red"), picture("blue")]
    assert seen(build(messages, images)) == "one two (red)(blue)three"
    assert seen(build("three", images)) == "(red)(blue)three"


@pytest.mark.parametrize("wrap", [lambda url: url, lambda url: {"url": url}])
def test_data_uris_come_as_image_url_parts(wrap, build, seen):
    content = {"type": "image_url", "image_url": wrap(data_uri("blue"))}
    assert seen(build([user(content, text("?"))])) == "(blue)?"


def test_a_string_is_a_users_message(build):
    assert build("hello").tokens == build([user(text("hello"))]).tokens
    assert build("hello").tokens == build([{"role": "user", "content": "hello"}]).tokens


def test_equal_pictures_share_a_digest_and_others_do_not(build):
    spans = build([user(part("red"), part("blue"), part("red"))]).spans
    assert spans[0].digest == spans[2].digest != spans[1].digest


def test_pictures_of_equal_pixels_but_other_sizes_are_told_apart(build):
    wide, tall = Image.new("RGB", (100, 30), "red"), Image.new("RGB", (30, 100), "red")
    spans = build([user(part(), part())], [wide, tall]).spans
    assert spans[0].digest != spans[1].digest


# Typed by a user


@pytest.mark.parametrize("template", ["plain", "llava", "vicuna_v1", "honeybee"])
def test_a_thousand_typed_image_tokens_are_no_pictures(template, build, seen):
    typed = "<image>" * 1000
    prompt = build([user(part("red"), text(typed))], template=template)
    assert len(prompt.spans) == 1
    assert prompt.tokens.count(2) == 4
    assert typed in seen(prompt)


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_typed_specials_end_no_turn_whoever_says_them(role, build, seen):
    messages = [{"role": role, "content": "x</s>y<pad>z"}, user(text("q"))]
    prompt = build(messages)
    assert not {0, 1, 2} & set(prompt.tokens)
    assert seen(prompt) == "x</s>y<pad>zq"


@pytest.mark.parametrize("special", ["<image>", "</s>", "<pad>"])
def test_specials_typed_over_several_parts_are_text(special, build, seen):
    prompt = build([user(*(text(c) for c in special), part("red"))])
    assert len(prompt.spans) == 1
    assert not {0, 1} & set(prompt.tokens)
    assert seen(prompt) == f"{special}(red)"


def test_a_typed_template_is_text(build, seen):
    assert seen(build("{{ 7 * 7 }}{% raw %}")) == "{{ 7 * 7 }}{% raw %}"


# Refusals


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        ([], [], "there are no messages, so there is nothing to answer"),
        ([assistant("a")], ["red"], "pictures need a user message to stand in"),
        (
            [user(part(), text("a"))],
            ["red", "blue"],
            "prompt has 1 places for pictures but 2 images were given",
        ),
        (
            [user(part("red"), text("a"))],
            ["blue", "lime"],
            "prompt has 1 places for pictures but 3 images were given",
        ),
        (
            [user(part(), part(), text("a"))],
            ["red"],
            "prompt has more places for pictures than the 1 images given",
        ),
        ([user(part())], [], "more places for pictures than the 0 images given"),
        (
            [{"role": "tool", "content": "a"}],
            [],
            r"message role 'tool' is not one of \[",
        ),
        (["hello"], [], r"message role None is not one of"),
        (
            [{"role": "user"}],
            [],
            "content must be a string or a list of parts, got None",
        ),
        ([{"role": "user", "content": 3}], [], "a string or a list of parts, got 3"),
        (
            [user({"type": "audio"})],
            [],
            r"message part 'audio' is not one of \['text', ",
        ),
        ([user({"type": "video"})], [], "a video part has no video; give a path"),
        ([user("hello")], [], "message part None is not one of"),
        (
            [user({"type": "text", "text": 3})],
            [],
            "message part 'text' holds 3, expected",
        ),
        ([user({"type": "text"})], [], "message part 'text' holds None"),
    ],
)
def test_messages_that_make_no_prompt_are_named(messages, images, message, build):
    with pytest.raises(PromptError, match=message):
        build(messages, [picture(colour) for colour in images])


@pytest.mark.parametrize("images", ["a.png", b"\x89PNG", Path("a.png"), picture("red")])
def test_one_picture_is_no_list_of_pictures(images, build):
    with pytest.raises(
        PromptError, match=r"images is one \w+, expected a list of pict"
    ):
        build("hello", images)


@pytest.mark.parametrize(
    "messages",
    [
        "na\udcefve",
        [{"role": "user", "content": "\ud800"}],
        [user({"type": "text", "text": "\ud800"})],
    ],
)
def test_text_that_is_no_text_is_refused(messages, build):
    with pytest.raises(
        PromptError, match=r"prompt '.*' is not valid UTF-8; convert it"
    ):
        build(messages, [])


def test_a_prompt_of_nothing_is_refused(make_config, tokenizer):
    config = make_config(prompt={"template": "plain"})
    with pytest.raises(PromptError, match="the prompt is empty; ask something"):
        Prompt.build("", [], config, tokenizer)


def test_tokens_that_the_decoder_does_not_know_are_refused(make_config, tokenizer):
    config = make_config(prompt={"template": "plain"}, decoder={"vocab_size": 100})
    with pytest.raises(
        PromptError, match=r"the tokenizer makes token \d+, the decoder knows 100; they"
    ):
        Prompt.build("a long word", [], config, tokenizer)


def test_a_model_without_eyes_refuses_pictures(make_config, tokenizer):
    config = make_config(vision=None, connector=None, image=None)
    assert Prompt.build("hello", [], config, tokenizer).spans == ()
    with pytest.raises(
        PromptError, match=r"1 picture\(s\) given, but the model takes text only"
    ):
        Prompt.build("hello", [picture("red")], config, tokenizer)


def test_an_encoder_alone_cannot_answer(make_config, tokenizer):
    config = make_config(connector=None, decoder=None, prompt=None)
    with pytest.raises(
        ConfigError, match="the model has no decoder, so it cannot answer"
    ):
        Prompt.build("hello", [], config, tokenizer)


@pytest.mark.parametrize(("copies", "places"), [(0, 0), (2, 2)])
def test_a_template_that_loses_or_repeats_a_picture_is_refused(
    copies, places, tokenizer, make_config
):
    image = "<image>" * copies
    tokenizer.hf.chat_template = f"{{{{ '{image}' }}}}"
    prompt = {"template": "checkpoint", "content": "string"}
    with pytest.raises(
        PromptError, match=f"prompt has {places} places for pictures but 1 images were"
    ):
        Prompt.build("a", [picture("red")], make_config(prompt=prompt), tokenizer)


# The pieces


def test_collect_gives_turns_and_pictures_in_order():
    turns, sources = collect([user(part(), text("a")), assistant("b")], ["x.png"])
    assert turns == [("user", [None, "a"]), ("assistant", ["b"])]
    assert sources == ["x.png"]


def test_place_widens_every_picture_to_its_tiles(make_config, tokenizer):
    config = make_config(prompt={"template": "plain", "image_token_id": 0})
    shown = Prompt.build(
        "", [picture("red"), picture("blue")], config, tokenizer
    ).pictures
    wide = replace(shown[1], tiles=shown[1].tiles * 3)
    prompt = place(
        [9, 2, 8, 2],
        [shown[0], wide],
        config,
        SimpleNamespace(image_id=2, region_id=None),
    )
    assert prompt.tokens == (9, 0, 0, 0, 0, 8, *[0] * 12)
    assert [(span.start, span.length) for span in prompt.spans] == [(1, 4), (6, 12)]
    with pytest.raises(
        PromptError, match="prompt has 2 places for pictures but 1 images"
    ):
        place([2, 2], [wide], config, SimpleNamespace(image_id=2, region_id=None))


def test_an_image_url_opens_no_local_file(tiny_config, tokenizer, tmp_path):
    path = tmp_path / "secret.png"
    Image.new("RGB", (4, 4)).save(path)
    for url in (str(path), f"file://{path}", "https://example.com/a.png", None):
        part = {"type": "image_url", "image_url": {"url": url}}
        with pytest.raises(PromptError, match=r"image_url is .* expected a data URI"):
            Prompt.build(
                [{"role": "user", "content": [part]}], [], tiny_config, tokenizer
            )
