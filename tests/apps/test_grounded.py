"""Regions on the command line, and boxes of an answer, printed and drawn.

The model's answer is forced by its weights: blocks that add nothing, embeddings of one
number each, and a head that says which token follows which.
"""

import io
import json
import sys

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken
from transformers import AutoTokenizer

from mm1_mlx.apps.cli import main
from mm1_mlx.writer import CheckpointWriter

ANSWER = "a dog [100, 200, 500, 900] and a cat [600, 0, 1000, 500]"
BOXES = [
    {"label": "a dog", "box": [4, 4, 20, 18]},
    {"label": "a cat", "box": [24, 0, 40, 10]},
]
SAMPLER = {
    "input_size": 32,
    "output_size": 336,
    "num_points": 40,
    "num_sub_points": [12, 5],
    "num_neighbours": 4,
}


@pytest.fixture
def mm1(monkeypatch, capfd):
    """Run the command; exit status, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mm1", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory, byte_folder, make_model):
    """A function: the folder of a model that answers with one token, then ends."""

    def model(answer=ANSWER, **changes):
        folder = tmp_path_factory.mktemp("forced")
        tokenizer = AutoTokenizer.from_pretrained(byte_folder)
        tokenizer.add_tokens([AddedToken(answer, special=False, normalized=False)])
        tokenizer.save_pretrained(folder / "tokenizer")
        made = make_model(
            connector={"output_size": 336},
            decoder={"hidden_size": 336, "vocab_size": 336},
            **changes,
        )
        tensors = made.tensors()
        for name, x in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensors[name] = mx.zeros_like(x)
        said = tokenizer.convert_tokens_to_ids(answer)
        asked = tokenizer.encode("ASSISTANT:")[-1]
        head = mx.zeros((336, 336))
        head[said, asked] = head[tokenizer.eos_token_id, said] = 1.0
        tensors["decoder.embed_tokens.weight"] = mx.eye(336)
        tensors["decoder.norm.weight"] = mx.ones(336)
        tensors["decoder.lm_head.weight"] = head
        out = folder / "model"
        with CheckpointWriter(out, made.config, {"format": "test"}) as writer:
            for name, x in tensors.items():
                writer.add(name, x)
            for path in (folder / "tokenizer").iterdir():
                writer.add_file(path.name, path)
        return out

    return model


@pytest.fixture(scope="module")
def plain(model):
    return model()


@pytest.fixture(scope="module")
def ferret(model):
    return model(region=SAMPLER)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (40, 20), "white").save(path)
    return path


def test_boxes_of_an_answer_are_printed_in_pixels(mm1, plain, picture):
    asked = ("generate", "-m", plain, "-p", "What?", "--json")
    code, out, err = mm1(*asked, "-i", picture)
    answer = json.loads(out)
    assert (code, err) == (0, "")
    assert answer["text"] == ANSWER
    assert answer["boxes"] == BOXES
    # Of several pictures, or none, the answer does not say which one it means.
    for images in ([], ["-i", picture, "-i", picture]):
        assert "boxes" not in json.loads(mm1(*asked, *images)[1])


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_boxes_of_an_answer_are_drawn_on_the_picture(
    form, mm1, plain, picture, tmp_path
):
    out = tmp_path / "drawn.png"
    asked = ("generate", "-m", plain, "-i", picture, "-p", "What?", "--draw", out)
    code, said, err = mm1(*asked, *form)
    assert code == 0
    assert form or said == f"{ANSWER}\n"
    assert err == f"{out}: 2 boxes\n"
    with Image.open(out) as drawn:
        assert drawn.size == (40, 20)
        assert drawn.getpixel((10, 18)) == (0xD6, 0x27, 0x28)
        assert drawn.getpixel((38, 10)) == (0x1F, 0x77, 0xB4)
    assert set(tmp_path.iterdir()) == {picture, out}


def test_regions_reach_the_model_where_the_prompt_says(
    mm1, ferret, plain, picture, tmp_path
):
    mask = np.zeros((20, 40), np.uint8)
    mask[5:10, 5:30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    regions = (
        *("--box", "1,2,30,15", "--box", "1:0,0,40,20", "--point", "3.5,4"),
        *("--mask", tmp_path / "mask.png", "--mask", f"1:{tmp_path / 'mask.png'}"),
    )
    asked = ("generate", "-i", picture, "--json", *regions)
    places = "<region> <region> <region> <region> <region>"
    spelled = (
        "[25, 100, 750, 750] [0, 0, 1000, 1000] [87, 200] [125, 250, 725, 450] "
        "[125, 250, 725, 450]"
    )
    for prompt, same in ((f"Is {places}?", f"Is {spelled}?"), ("Is", f"Is {spelled}")):
        # Four image tokens and one for each region, whose coordinates are text.
        answer = json.loads(mm1(*asked, "-m", ferret, "-p", prompt)[1])
        assert answer["image_tokens"] == 4 + 5
        alone = json.loads(mm1(*asked, "-m", plain, "-p", prompt)[1])
        assert alone["image_tokens"] == 4
        text = ("generate", "-i", picture, "--json", "-m", plain, "-p", same)
        expected = json.loads(mm1(*text)[1])
        assert alone["prompt_tokens"] == expected["prompt_tokens"]


def test_a_prompt_may_speak_of_regions_without_any(mm1, plain):
    code, out, _ = mm1("generate", "-m", plain, "-p", "What does <region> mean?")
    assert (code, out) == (0, f"{ANSWER}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--box", "1,2,3"], "--box '1,2,3' is not X1,Y1,X2,Y2 or N:X1,Y1,X2,Y2"),
        (["--point", "a,b"], "--point 'a,b' is not X,Y or N:X,Y"),
        (["--point", "0:1,1"], "--point '0:1,1': pictures are counted from 1"),
        (["-p", "<region> <region>", "--point", "1,1"], "the prompt says <region> 2"),
        (["-i", "{picture}", "--draw", "out.png"], "--draw needs one picture, got 2"),
    ],
)
def test_usage_that_makes_no_sense_is_exit_2(
    arguments, message, mm1, plain, picture, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "300")
    given = [x.format(picture=picture) for x in arguments]
    prompt = [] if "-p" in given else ["-p", "x"]
    code, out, err = mm1("generate", "-m", plain, "-i", picture, *prompt, *given)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("kind", ["--box=1,2,3,4", "--point=1,1", "--mask=x.png"])
def test_a_region_without_a_picture_asks_for_one(kind, mm1, plain, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    code, out, err = mm1("generate", "-m", plain, "-p", "x", kind)
    assert (code, out) == (2, "")
    assert "--box, --point and --mask are places in a picture; give it by -i" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--box", "1,2,99,9"], "box [1, 2, 99, 9] is not inside picture 1"),
        (["--box", "9,2,1,9"], "is reversed, expected left, top, right, bottom"),
        (
            ["--point", "3:1,1"],
            "refers to picture 2, counted from 0, but the prompt ha",
        ),
        (["--mask", "none.png"], "mask 'none.png' was not found; give the path"),
        (["--draw", "out.tiff"], "'out.tiff' ends with '.tiff', expected one of"),
    ],
)
def test_regions_of_no_picture_are_one_line(arguments, message, mm1, plain, picture):
    code, out, err = mm1("generate", "-m", plain, "-i", picture, "-p", "x", *arguments)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert message in err


def test_a_drawing_is_not_begun_where_it_cannot_end(mm1, plain, tmp_path):
    result = mm1("generate", "-m", plain, "-p", "x", "--draw", tmp_path / "a.png")
    assert result[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_does_not_fit_its_drawing_is_not_asked_about(
    mm1, plain, tmp_path
):
    long = tmp_path / "long.png"
    Image.new("RGB", (16_384, 2)).save(long)
    asked = ("generate", "-m", plain, "-i", long, "-p", "x", "--draw")
    code, out, err = mm1(*asked, tmp_path / "a.webp")
    assert (code, out) == (1, "")
    assert "16384 x 2 pixels, but a WebP file holds at most 16383 a side" in err
    assert list(tmp_path.iterdir()) == [long]


def test_a_picture_from_stdin_is_drawn_on(mm1, plain, tmp_path, monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), "white").save(buffer, "PNG")
    stdin = io.TextIOWrapper(io.BytesIO(buffer.getvalue()))
    monkeypatch.setattr(sys, "stdin", stdin)
    out = tmp_path / "drawn.jpg"
    assert mm1("generate", "-m", plain, "-i", "-", "-p", "x", "--draw", out)[0] == 0
    with Image.open(out) as drawn:
        assert drawn.format == "JPEG"
