"""A picture's tiles become one run of image tokens, in the order of the tiling."""

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mm1_mlx.config import AnyresTiling, MM1Config, SplitTiling
from mm1_mlx.errors import PromptError
from mm1_mlx.image import load_picture
from mm1_mlx.layout import Crop, Picture, Span, content_of, count_picture_tokens
from mm1_mlx.models import MM1
from mm1_mlx.models.arrange import arrange
from mm1_mlx.prompt import Prompt

SIDE = 3


def tiled(rows, columns, size):
    places = [(r + 1, c + 1) for r in range(rows) for c in range(columns)]
    tile = np.zeros((4, 4, 3), np.float32)
    return Picture((tile,) * (len(places) + 1), size, "", ((0, 0), *places))


def numbered(count):
    """Tiles whose tokens say which tile, row and column they are."""
    return [
        mx.array([[t, r, c] for r in range(SIDE) for c in range(SIDE)], mx.float32)
        for t in range(count)
    ]


def test_one_tile_is_its_tokens():
    (tile,) = numbered(1)
    picture = Picture((), (4, 4), "")
    assert arrange([tile], picture, None, None) is tile


def test_flat_tiles_follow_each_other():
    tiles = numbered(3)
    for tiling in (None, SplitTiling(), AnyresTiling(grids=((1, 2),), merge="flat")):
        joined = arrange(tiles, tiled(1, 2, (8, 4)), tiling, None)
        assert joined.tolist() == mx.concatenate(tiles).tolist()


def test_rows_run_across_tiles_behind_the_overview():
    tiles, tiling = numbered(7), AnyresTiling(grids=((2, 3),), merge="rows")
    joined = arrange(tiles, tiled(2, 3, (12, 8)), tiling, None).tolist()
    expected = tiles[0].tolist()
    for row in range(2 * SIDE):
        for column in range(3 * SIDE):
            tile = 1 + row // SIDE * 3 + column // SIDE
            expected.append([tile, row % SIDE, column % SIDE])
    assert joined == expected


def test_padding_goes_and_a_newline_ends_every_row():
    # A 2 x 2 grid of 6 x 6 image tokens; the picture fills the middle four rows.
    picture, tiling = tiled(2, 2, (60, 40)), AnyresTiling(grids=((2, 2),))
    newline = mx.array([9.0, 9.0, 9.0])
    joined = arrange(numbered(5), picture, tiling, newline)
    assert joined.shape == (SIDE**2 + 4 * 7, 3)
    rows = joined[SIDE**2 :].reshape(4, 7, 3)
    assert rows[:, 6].tolist() == [[9.0, 9.0, 9.0]] * 4
    assert rows[0, 0].tolist() == [1, 1, 0]
    assert rows[3, 5].tolist() == [4, 1, 2]


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (50, 50), (1, 90), (33, 100)])
@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)])
@pytest.mark.parametrize("side", [24, 3])
@pytest.mark.reference
def test_the_content_of_a_grid_equals_transformers(size, grid, side):
    torch = pytest.importorskip("torch")
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    rows, columns = grid
    sheet = torch.arange(rows * columns * side**2).reshape(1, rows * side, -1)
    expected = unpad_image(sheet, (size[1], size[0]))[0]
    crop = content_of(tiled(rows, columns, size), side)
    bottom, right = crop.top + crop.height, crop.left + crop.width
    assert sheet[0, crop.top : bottom, crop.left : right].equal(expected)


def test_a_square_picture_in_a_square_grid_has_no_padding():
    assert content_of(tiled(2, 2, (70, 70)), SIDE) == Crop(0, 0, 6, 6)


TILINGS = {
    "none": None,
    "split": {"kind": "split"},
    "index": {"kind": "split", "overview": "last", "indicators": "index"},
    "seps": {"kind": "dynamic", "max_grid_tiles": 6, "indicators": "seps"},
    "flat": {"kind": "anyres", "grids": [[2, 2], [1, 3]], "merge": "flat"},
    "rows": {"kind": "anyres", "grids": [[2, 2], [1, 3]], "merge": "rows"},
    "unpad": {"kind": "anyres", "grids": [[2, 2], [1, 3]], "merge": "unpad"},
}


@pytest.fixture(params=TILINGS)
def tiled_config(request, make_config):
    """The tiny config with an MLP for its connector, in every tiling."""
    values = make_config().to_dict()
    values["image"]["tiling"] = TILINGS[request.param]
    values["connector"] = {
        "kind": "mlp", "input_size": 32, "num_features": 16, "output_size": 48,
        "hidden_size": 8, "newline": request.param == "unpad",
    }  # fmt: skip
    return MM1Config.from_dict(values)


@pytest.mark.parametrize("size", [(40, 40), (90, 31), (20, 70)])
def test_as_many_tokens_are_counted_as_are_made(size, tiled_config):
    picture = load_picture(Image.new("RGB", size, "red"), tiled_config.image)
    (tokens,) = MM1(tiled_config).encode([picture])
    assert tokens.shape == (count_picture_tokens(picture, tiled_config), 48)


def test_every_image_token_stands_in_the_prompt_once(tiled_config, tokenizer):
    model = MM1(tiled_config)
    photos = [Image.new("RGB", (90, 31), "red"), Image.new("RGB", (20, 70), "blue")]
    prompt = Prompt.build("What colour?", photos, tiled_config, tokenizer)
    image_tokens = model.encode(prompt.pictures)
    embeddings = model.embed(mx.array(prompt.tokens), image_tokens, prompt.spans)
    for number, tokens in enumerate(image_tokens):
        spans = [span for span in prompt.spans if span.picture == number]
        held = [embeddings[span.start : span.stop] for span in spans]
        assert mx.array_equal(mx.concatenate(held), tokens)
    filled = {i for span in prompt.spans for i in range(span.start, span.stop)}
    text = [i for i in range(len(prompt.tokens)) if i not in filled]
    words = mx.array([prompt.tokens[i] for i in text])
    expected = model.decoder.embed_tokens(words)
    assert mx.array_equal(embeddings[mx.array(text)], expected)


def test_indicators_are_text_between_the_tiles(make_config, tokenizer):
    tiling = {"kind": "split", "overview": "last", "indicators": "seps"}
    config = make_config(image={"tiling": tiling}, prompt={"template": "plain"})
    prompt = Prompt.build("", [Image.new("RGB", (40, 40))], config, tokenizer)
    texts, end = [], 0
    for span in prompt.spans:
        texts.append(tokenizer.hf.decode(list(prompt.tokens[end : span.start])).strip())
        end = span.stop
    assert texts == ["", ",", "<n>", ",", ":"]
    assert [span.offset for span in prompt.spans] == [0, 4, 8, 12, 16]


def test_spans_that_miss_the_end_of_a_picture_are_named(tiny_model):
    tile = np.zeros((16, 16, 3), np.float32)
    image_tokens = tiny_model.encode([Picture((tile, tile), (16, 16), "")])
    spans = [Span(0, 4, "picture", 0, ""), Span(5, 3, "picture", 0, "", 4)]
    message = "picture 1 has 8 image tokens but the prompt holds 7 places"
    with pytest.raises(PromptError, match=message):
        tiny_model.embed(mx.array([2] * 8), image_tokens, spans)
