"""Prompts to learn on and to measure by."""

import json

import numpy as np
import pytest
from PIL import Image

from mm1_mlx.checkpoint import load_config
from mm1_mlx.errors import DataError, PromptError
from mm1_mlx.prompt import Prompt
from mm1_mlx.quantize.calibration import QUESTIONS, TEXTS, examples
from mm1_mlx.quantize.pictures import draw_picture
from mm1_mlx.runtime import TINY
from mm1_mlx.tokenizer import load_tokenizer


def save(folder, names):
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def test_every_fourth_is_held_out_and_none_is_in_both():
    train, held_out = examples(None, 64, sees=True)
    assert (len(train), len(held_out)) == (48, 16)
    pixels = [x.pictures[0].tobytes() for x in (*train, *held_out)]
    assert len(set(pixels)) == 64
    # Both ask everything.
    assert {x.prompt for x in train} == {x.prompt for x in held_out} == set(QUESTIONS)


def test_a_model_of_text_is_asked_without_pictures():
    train, held_out = examples(None, 64, sees=False)
    assert sorted(x.prompt for x in (*train, *held_out)) == sorted(TEXTS)
    assert not any(x.pictures for x in train)


def test_pictures_are_the_same_for_the_same_seed():
    pixels = [np.asarray(draw_picture(seed)) for seed in (1, 1, 2)]
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])


def test_a_folder_gives_its_pictures(tmp_path):
    folder = save(tmp_path / "in", [f"{i}.png" for i in range(9)])
    (folder / "notes.txt").write_text("no picture")
    train, held_out = examples(folder, 8, sees=True)
    assert [x.pictures[0].name for x in held_out] == ["3.png", "7.png"]
    assert len(train) == 6


def test_a_file_names_prompts_and_pictures(tmp_path):
    lines = [{"prompt": f"{i}?", "images": ["a.png"] * (i % 3)} for i in range(4)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    train, held_out = examples(path, 100, sees=True)
    assert [x.prompt for x in train] == ["0?", "1?", "2?"]
    assert train[2].pictures == (tmp_path / "a.png",) * 2
    assert held_out[0].pictures == ()


ASKED = {"image": "a.png", "question": "What?", "answer": "red"}
SPOKEN = {
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "What?\n<image>"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "And the other?"},
        {"from": "gpt", "value": "blue"},
    ],
}


@pytest.mark.parametrize(
    ("row", "texts"),
    [(ASKED, ["What?"]), (SPOKEN, ["What?\n"]),
     ({"prompt": "What?", "completion": "red"}, ["What?"])],
)  # fmt: skip
def test_rows_to_train_on_are_asked_up_to_their_first_answer(row, texts, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text((json.dumps(row) + "\n") * 4)
    _, (example,) = examples(path, 8, sees=True)
    (message,) = example.prompt
    assert message["role"] == "user"
    shown = [part for part in message["content"] if part["type"] == "image"]
    said = [part["text"] for part in message["content"] if part["type"] == "text"]
    assert "".join(said).strip() == "".join(texts).strip()
    assert (
        example.pictures
        == (tmp_path / "a.png",) * ("image" in row)
        == tuple(tmp_path / "a.png" for _ in shown)
    )


def test_they_are_asked_of_the_model(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(ASKED)}\n{json.dumps(SPOKEN)}\n" * 2)
    config = load_config(TINY)
    tokenizer = load_tokenizer(TINY, config.prompt)
    (one, _, _), (other,) = examples(path, 8, sees=True)
    first, second = (
        Prompt.build(x.prompt, x.pictures, config, tokenizer) for x in (one, other)
    )
    alone = Prompt.build("What?", [tmp_path / "a.png"], config, tokenizer)
    assert first.tokens == alone.tokens
    assert len(second.pictures) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"caption": "a star", "image": "a.png"}, "asks nothing; give questions, or a"),
        ({"text": "of stars"}, "asks nothing; give questions, or a"),
        (ASKED | {"image": "../a.png"}, "lies outside .*; put the file of prompts"),
        ({"prompt": "a", "images": ["../a.png"]}, "lies outside .*; put the file of"),
    ],
)
def test_rows_that_ask_nothing_or_lead_out_are_refused(row, said, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text((json.dumps(row) + "\n") * 4)
    with pytest.raises(DataError, match=rf"mine.jsonl:1: .*{said}"):
        examples(path, 8, sees=True)


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[1]",
        "{}",
        '{"images": []}',
        '{"prompt": 1}',
        '{"prompt": "a", "image": "b.png"}',
        '{"prompt": "a", "images": "b.png"}',
        '{"prompt": "a", "images": [1]}',
        "[" * 100_000,
    ],
)
def test_another_line_is_refused(line, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(DataError, match=r"prompts.jsonl:2: "):
        examples(path, 8, sees=True)


def test_what_is_not_there_or_too_little_is_refused(tmp_path):
    with pytest.raises(
        PromptError, match=r"'.*nowhere' does not exist; give a folder of"
    ):
        examples(tmp_path / "nowhere", 8, sees=True)
    with pytest.raises(
        PromptError, match=r"has 0 example\(s\) .* at least 4 are needed"
    ):
        examples(tmp_path, 8, sees=True)
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"x.jsonl:1: not UTF-8"):
        examples(tmp_path / "x.jsonl", 8, sees=True)


def test_a_folder_gives_no_folders_and_nothing_hidden(tmp_path):
    folder = save(tmp_path / "in", [f"{i}.png" for i in range(4)])
    (folder / "5.png").mkdir()
    (folder / "._0.png").write_bytes(b"what a Mac leaves")
    train, held_out = examples(folder, 8, sees=True)
    names = {x.pictures[0].name for x in (*train, *held_out)}
    assert names == {"0.png", "1.png", "2.png", "3.png"}


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0c"])
def test_a_line_ends_with_a_line_feed_alone(separator, tmp_path):
    prompt = f"a{separator}b"
    line = json.dumps({"prompt": prompt}, ensure_ascii=False)
    path = tmp_path / "prompts.jsonl"
    path.write_text("\r\n".join([line] * 4), encoding="utf-8", newline="")
    train, held_out = examples(path, 8, sees=True)
    assert [x.prompt for x in (*train, *held_out)] == [prompt] * 4


def test_a_byte_order_mark_is_no_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' * 4, encoding="utf-8-sig")
    assert len(examples(path, 8, sees=True)[0]) == 3


@pytest.mark.parametrize("count", [3, 2, 1, 0, -1])
def test_so_few_that_none_is_held_out_are_refused(count):
    with pytest.raises(
        PromptError, match=rf"^{count} example\(s\) are too few to learn"
    ):
        examples(None, count, sees=True)
