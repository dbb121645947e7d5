"""Examples stand before the question, as turns or as a base model's text."""

import json

import pytest
from PIL import Image

from mm1_mlx.config import PromptConfig
from mm1_mlx.errors import PromptError
from mm1_mlx.messages import Region, collect
from mm1_mlx.prompt import Prompt
from mm1_mlx.shots import (
    Shot,
    choose_style,
    final_answer,
    read_shots,
    stops_of,
    with_shots,
)

RED, BLUE, LIME = (Image.new("RGB", (16, 16), c) for c in ("red", "blue", "lime"))
VQA = [Shot((RED,), "red", "What colour?"), Shot((BLUE,), "blue", "And this?")]
CAPTIONS = [Shot((RED,), "a red square"), Shot((BLUE,), "a blue square")]


def written(messages):
    """The messages with pictures as marks: what a template would see."""
    return [
        (
            m["role"],
            m["content"]
            if isinstance(m["content"], str)
            else "".join(
                part["text"] if part["type"] == "text" else "<image>"
                for part in m["content"]
            ),
        )
        for m in messages
    ]


def test_questions_are_turns_of_a_chat():
    messages = with_shots(VQA, "What now?", [LIME], "chat")
    assert written(messages) == [
        ("user", "<image>What colour?"),
        ("assistant", "red"),
        ("user", "<image>And this?"),
        ("assistant", "blue"),
        ("user", "<image>What now?"),
    ]


def test_captions_of_a_chat_answer_the_question_itself():
    messages = with_shots(CAPTIONS[:1], "Describe it.", [LIME], "chat")
    assert written(messages) == [
        ("user", "<image>Describe it."),
        ("assistant", "a red square"),
        ("user", "<image>Describe it."),
    ]


def test_a_system_message_stays_first():
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": LIME}]},
    ]
    messages = with_shots(VQA[:1], prompt, [], "chat")
    roles = [role for role, _ in written(messages)]
    assert roles == ["system", "user", "assistant", "user"]


def test_a_base_model_reads_one_text_of_captions():
    messages = with_shots(CAPTIONS, "", [LIME], "caption")
    text = (
        "<image> A photo of a red square\n<image> A photo of a blue square\n"
        "<image> A photo of"
    )
    assert written(messages) == [("user", text)]


def test_a_base_model_reads_one_text_of_questions():
    messages = with_shots(VQA, "What now?", [LIME], "vqa")
    text = (
        "<image> Question: What colour? Short answer: red\n"
        "<image> Question: And this? Short answer: blue\n"
        "<image> Question: What now? Short answer:"
    )
    assert written(messages) == [("user", text)]


def test_pictures_keep_their_order_in_the_prompt(make_config, tokenizer):
    config = make_config(prompt={"template": "plain"})
    for style in ("chat", "caption", "vqa"):
        messages = with_shots(VQA, "What now?", [LIME, RED], style)
        prompt = Prompt.build(messages, [], config, tokenizer)
        colours = [p.tiles[0][0, 0].round(2).tolist() for p in prompt.pictures]
        red, blue, lime = [1.0, -1.0, -1.0], [-1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]
        assert colours == [red, blue, lime, red]


@pytest.mark.parametrize(
    ("style", "shots", "template", "expected"),
    [
        ("auto", VQA, "plain", "vqa"),
        ("auto", CAPTIONS, "plain", "caption"),
        ("auto", VQA, "llava", "chat"),
        ("chat", VQA, "plain", "chat"),
        ("vqa", CAPTIONS, "llava", "vqa"),
    ],
)
def test_the_style_follows_the_template(style, shots, template, expected):
    assert choose_style(style, shots, PromptConfig(template=template)) == expected


def test_answers_of_base_models_end_where_the_examples_do():
    thought = [Shot((RED,), "red", "What?", "It looks warm. So it is red.")]
    assert stops_of("chat", VQA) == ()
    assert stops_of("caption", CAPTIONS) == ("\n",)
    assert stops_of("vqa", VQA) == ("\n", ".", ",")
    # Thoughts are made of sentences.
    assert stops_of("vqa", thought) == ("\n",)


def test_thoughts_stand_before_their_answer():
    shot = Shot((RED,), "red", "What colour?", "It looks warm.")
    messages = with_shots([shot], "And this?", [LIME], "chat")
    assert written(messages)[1] == ("assistant", "It looks warm. Answer: red")
    assert final_answer("It looks warm. Answer: red") == "red"
    assert final_answer("Answer: one. Answer: two ") == "two"
    assert final_answer("just red") == "just red"


def test_shots_are_read_beside_their_file(tmp_path):
    rows = [
        {"image": "a.png", "question": "What?", "answer": "red"},
        {"images": ["a.png", "sub/b.png"], "caption": "two"},
        {"image": "a.png", "question": "q", "reasoning": "r", "answer": "a"},
    ]
    path = tmp_path / "shots.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert read_shots(path) == [
        Shot((tmp_path / "a.png",), "red", "What?"),
        Shot((tmp_path / "a.png", tmp_path / "sub/b.png"), "two"),
        Shot((tmp_path / "a.png",), "a", "q", "r"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no examples"),
        ("no json", "shots.jsonl:1: expected a JSON object, got 'no json'"),
        ("[1]", "shots.jsonl:1: expected a JSON object"),
        ("\n{}", "shots.jsonl:2: expected either an answer or a caption"),
        ('{"answer": "a", "caption": "b", "image": "c"}', "either an answer or a cap"),
        ('{"answer": 3, "image": "c"}', "answer is 3, expected text"),
        ('{"answer": "a"}', "expected image, a path, or images"),
        ('{"answer": "a", "images": "b"}', "expected image, a path, or images"),
        ('{"answer": "a", "image": "b", "images": ["c"]}', "image or images, not both"),
        ('{"answer": "a", "image": "b", "shot": 1}', r"unknown field\(s\) \['shot'\]"),
    ],
)
def test_a_line_that_is_no_example_is_named(text, message, tmp_path):
    path = tmp_path / "shots.jsonl"
    path.write_text(text)
    with pytest.raises(PromptError, match=message):
        read_shots(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(PromptError, match="cannot be read: No such file"):
        read_shots(tmp_path / "missing.jsonl")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(PromptError, match="cannot be read: it is not UTF-8"):
        read_shots(tmp_path / "bytes")


def test_one_text_has_no_turns():
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(PromptError, match="use shot style 'chat'"):
        with_shots(VQA, prompt, [], "vqa")


def test_an_unknown_style_is_named():
    with pytest.raises(PromptError, match="shot style 'few' is not one of"):
        choose_style("few", VQA, PromptConfig(template="plain"))


def test_lines_end_at_newlines_alone(tmp_path):
    path = tmp_path / "shots.jsonl"
    text = '{"image": "a.png", "question": "q", "answer": "one\u2028two\x85"}'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    assert read_shots(path)[0].answer == "one\u2028two\x85"


@pytest.mark.parametrize("style", ["chat", "vqa"])
@pytest.mark.parametrize(
    ("shots", "prompt", "message"),
    [
        (VQA, [], "there are no messages"),
        (VQA, ["hello"], "message role None is not one of"),
        (VQA, [{"role": "user", "content": None}], "content must be a string or a"),
        (VQA, [{"role": "user", "content": 5}], "content must be a string or a list"),
        (VQA, [{"role": "user", "content": [5]}], "message part None is not one of"),
        ([{"image": "a"}], "What?", "shots holds .*, expected a Shot"),
    ],
)
def test_what_is_no_message_is_named(style, shots, prompt, message):
    with pytest.raises(PromptError, match=message):
        with_shots(shots, prompt, [], style)


def test_pictures_go_where_the_messages_ask_for_them(make_config, tokenizer):
    prompt = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "B"}]},
    ]
    messages = with_shots(VQA[:1], prompt, [LIME, BLUE], "chat")
    config = make_config(prompt={"template": "plain"})
    built = Prompt.build(messages, [], config, tokenizer)
    colours = [p.tiles[0][0, 0].round(2).tolist() for p in built.pictures]
    assert colours == [[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]


@pytest.mark.parametrize("style", ["chat", "vqa"])
def test_regions_go_on_meaning_their_picture(style):
    region = {"type": "region", "picture": 0, "box": [1, 2, 3, 4]}
    content = [{"type": "image", "image": LIME}, region, {"type": "text", "text": "?"}]
    prompt = [{"role": "user", "content": content}]
    messages = with_shots(VQA, prompt, [], style)
    (moved,) = [p for p in messages[-1]["content"] if p["type"] == "region"]
    assert moved["picture"] == len(VQA)


@pytest.mark.parametrize("style", ["chat", "vqa", "caption"])
def test_a_region_means_the_picture_before_it_wherever_that_is_put(style):
    def box(**picture):
        return {"type": "region", "box": [1, 2, 3, 4], **picture}

    content = [
        {"type": "video", "video": [BLUE, BLUE, BLUE]},
        *(
            {"type": "image", "image": LIME},
            {"type": "text", "text": "what is "},
            box(),
        ),
        *({"type": "image", "image": RED}, {"type": "text", "text": " or "}, box()),
        box(picture=3),
    ]
    prompt = [{"role": "user", "content": content}]
    turns, sources = collect(with_shots(VQA, prompt, [], style), [])
    regions = [p for _, parts in turns for p in parts if isinstance(p, Region)]
    shown = [sources[region.picture] for region in regions]
    assert shown == [LIME, RED, LIME]
