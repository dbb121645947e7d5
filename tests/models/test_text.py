"""The text tower reads causally, and at the place where a text ends."""

import mlx.core as mx
import numpy as np
import pytest

from mm1_mlx.config import MM1Config, TextConfig
from mm1_mlx.errors import ConfigError
from mm1_mlx.models.text import TextEncoder

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 9,
    "projection_size": 20,
}
END = 59


@pytest.fixture
def make_encoder(reinitialise):
    return lambda **changes: reinitialise(TextEncoder(TextConfig(**SIZES | changes)))


@pytest.mark.parametrize("end", [None, END])
def test_what_follows_the_end_changes_nothing(end, make_encoder, assert_close):
    encoder = make_encoder(eos_token_id=end)
    texts = mx.array([[3, 4, END, 0, 0, 0], [3, 4, END, 7, 58, END]])
    first, second = encoder(texts)
    # To rounding: a kernel may sum the rows of a matrix in different orders.
    assert_close(first, second, "op")


@pytest.mark.parametrize("end", [None, END])
def test_every_token_up_to_the_end_counts(end, make_encoder):
    encoder = make_encoder(eos_token_id=end)
    text = [3, 4, 5, END, 0]
    expected = encoder(mx.array([text]))
    for place in range(3):
        changed = [*text]
        changed[place] = 6
        assert mx.abs(encoder(mx.array([changed])) - expected).max() > 0.1


def test_padding_does_not_change_an_embedding(make_encoder, assert_close):
    encoder = make_encoder()
    short, long = mx.array([[3, 4, END]]), mx.array([[3, 4, END, 0, 0, 0, 0]])
    assert_close(encoder(long), encoder(short))


def test_a_batch_equals_its_texts_alone(make_encoder, assert_close):
    encoder = make_encoder(eos_token_id=END)
    texts = mx.array([[3, END, 0, 0], [4, 5, 6, END], [END, 1, 2, 3]])
    alone = mx.concatenate([encoder(texts[i : i + 1]) for i in range(3)])
    assert_close(encoder(texts), alone)


def test_the_first_end_is_read_the_highest_is_not(make_encoder):
    """Where a token of a higher id stands elsewhere the two rules part."""
    texts = mx.array([[3, 59, 40, 0]])
    by_token, by_height = make_encoder(eos_token_id=40), make_encoder()
    by_height.update(by_token.parameters())
    assert mx.abs(by_token(texts) - by_height(texts)).max() > 0.1
    same = mx.array([[3, 4, 40, 0]])
    assert mx.array_equal(by_token(same), by_height(same))


def test_the_scale_begins_as_clip_s():
    scale = TextEncoder(TextConfig(**SIZES)).logit_scale
    assert scale.shape == ()
    np.testing.assert_allclose(scale.item(), 2.6592, rtol=1e-4)


def test_a_text_that_is_too_long_is_an_error(make_encoder):
    with pytest.raises(ValueError, match="texts have 10 tokens, expected at most 9"):
        make_encoder()(mx.zeros((1, 10), mx.int32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "not a multiple of num_attention_heads 5"),
        ({"eos_token_id": 60}, "eos_token_id: 60 is outside the vocabulary of 60"),
        ({"pad_token_id": -1}, "pad_token_id: -1 is outside"),
    ],
)
def test_a_tower_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TextConfig(**SIZES | changes)


def test_both_towers_share_one_space(make_config):
    vision = make_config().vision.to_dict()
    vision |= {"feature_layer": -1, "apply_post_norm": True, "projection_size": 24}
    message = "text.projection_size is 20 but vision.projection_size is 24"
    with pytest.raises(ConfigError, match=message):
        MM1Config.from_dict({"vision": vision, "text": SIZES})


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_embeddings_are_nearly_equal_in_half_precision(
    dtype, make_encoder, assert_close
):
    encoder, texts = make_encoder(), mx.array([[3, 4, 5, END]])
    expected = encoder(texts)
    encoder.set_dtype(dtype)
    result = encoder(texts)
    assert result.dtype == dtype
    assert_close(result, expected, str(dtype).removeprefix("mlx.core."))
